"""The output folder of a run: one run at a time, and no stranger's files."""

from lora_ms import saving
from lora_ms.cli.main import main


def test_a_run_that_is_refused_writes_nothing(model, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "adapter").mkdir(parents=True)
    (out / "adapter" / "mine.txt").write_text("precious")
    words = ["finetune", "--load_checkpoint", model, "--train_dataset_dir", rows_file, "--seq_length", "16"]
    assert main([*map(str, words), "--output_dir", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} holds adapter/mine.txt, which no run is known to")
    assert [p.name for p in out.iterdir()] == ["adapter"]


def test_a_folder_has_one_run(model, rows_file, tmp_path, capsys):
    words = ["finetune", "--load_checkpoint", model, "--train_dataset_dir", rows_file, "--seq_length", "16"]
    with saving.locked(tmp_path):
        assert main([*map(str, words), "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: output_dir {tmp_path} is being written by another process: wait for it, or stop it, or give another "
        "output_dir\n"
    )
    assert list(tmp_path.iterdir()) == []
