"""Ctrl-C in the article's own command: the step under way is finished and saved, and the run can go on."""

import json
import signal
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file


def finetune(root, reference, python, folder, *more) -> list[str]:
    return [
        python, "run_mindformer.py", "--config", str(root / "configs/tiny/lora_tiny.yaml"), "--run_mode", "finetune",
        "--load_checkpoint", str(reference / "models" / "qwen2"), "--train_dataset_dir", str(folder / "rows.jsonl"),
        "--output_dir", str(folder / "out"), "--seq_length", "16", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_resumes(root, reference, golden, python, python_env, tmp_path):
    values = golden("trace_qwen2")
    rows = [
        {"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()}
        for ids, labels, n in zip(values["input_ids"].reshape(-1, 16), values["labels"].reshape(-1, 16),
                                  values["lengths"].ravel(), strict=True)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, log, pipe = tmp_path / "out", open(tmp_path / "screen", "w+"), subprocess.PIPE
    command = finetune(root, reference, python, tmp_path, "--max_steps", "100000")
    with log, subprocess.Popen(command, cwd=root, env=python_env, stdout=pipe, stderr=log, text=True) as child:
        for line in child.stdout:
            if line.startswith("step      3/100000"):
                child.send_signal(signal.SIGINT)
                break
        else:
            log.seek(0)
            pytest.fail(f"no third step: {log.read()}")
        rest = child.stdout.read()
        assert child.wait(60) == 130
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    done = len(lines)
    assert 3 <= done < 100000 and [line["step"] for line in lines] == list(range(1, done + 1))
    assert rest.splitlines()[-2:] == [
        f"stopped after step {done:,} of 100,000, and saved",
        "to go on, give the same command with --resume_training True",
    ]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step_{done}"]
    saved = load_file(out / "checkpoints" / f"step_{done}" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(np.isfinite(value).all() for value in saved.values())
    assert not (out / "adapter").exists()
    assert (out / "run.log").read_text().endswith(rest.splitlines()[-1] + "\n")

    # a shorter run is another schedule, unless the schedule's own length is given
    shorter = ["--max_steps", str(done + 2), "--lr_schedule.total_steps", "100000", "--resume_training", "True"]
    command = finetune(root, reference, python, tmp_path, *shorter)
    again = subprocess.run(command, cwd=root, env=python_env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, done + 3))
    assert len(load_file(out / "adapter" / "adapter_model.safetensors")) == 28
