"""What several processes cannot do is refused in one line, before data or weights are read."""

import pytest

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_format import save_adapter
from lora_ms.cli.main import main
from lora_ms.config import load_config
from lora_ms.models.hub import load_directory
from lora_ms.nn.parallel import Shard
from lora_ms.recipes.session import layout_notices
from lora_ms.runtime.device import Runtime

PET = "--model.model_config.pet_config"
KEY = "parallel_config.model_parallel"
WITHOUT = "error: parallel_config.model_parallel 2 does not support {}: leave it out, or set it to 1"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--parallel_config.pipeline_stage 2", "error: parallel_config.pipeline_stage 2 is not supported: set it to 1"),
        ("--parallel_config.context_parallel 4", "error: parallel_config.context_parallel 4 is not supported: set"),
        (f"--{KEY} 3", f"error: {KEY} 3 does not divide the model's num_heads 4, n_kv_heads 2, vocab_size 128: choose"),
        (f"--{KEY} 4", f"error: {KEY} 4 does not divide the model's n_kv_heads 2: choose a number that does"),
        (f"--{KEY} 2 {PET} null", f"error: {KEY} 2 trains adapters only: give pet_config, or set it to 1"),
        (f"--{KEY} 2 {PET}.pet_type adalora", WITHOUT.format("pet_type adalora")),
        (f"--{KEY} 2 {PET}.use_dora True {PET}.bias all", WITHOUT.format("use_dora, bias")),
        (f"--{KEY} 2 {PET}.init_lora_weights pissa", WITHOUT.format("init_lora_weights")),
        (f"--{KEY} 2 {PET}.lora_bias True", WITHOUT.format("lora_bias")),
        (f"--{KEY} 2 {PET}.modules_to_save norm", WITHOUT.format("modules_to_save")),
        (f"--{KEY} 2 {PET}.target_modules q_proj|lm_head", WITHOUT.format("lm_head in target_modules")),
        (f"--{KEY} 2 --evaluation.prompts [Hello]", f"error: {KEY} 2: evaluation.prompts runs with the whole model"),
        (f"--{KEY} 2", "error: use_parallel is True, but this process was not started by msrun; use: bash scripts/"),
    ],
)
def test_refused(model, rows_file, tmp_path, capsys, words, line):
    common = [
        "--load_checkpoint",
        str(model),
        "--train_dataset_dir",
        str(rows_file),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["finetune", *common, "--use_parallel", "True", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_processes_that_would_each_train_alone(model, rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "8")
    words = [
        "--load_checkpoint",
        str(model),
        "--train_dataset_dir",
        str(rows_file),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["finetune", *words]) == 2
    said = capsys.readouterr().err
    assert said == "error: msrun has started 8 processes, and use_parallel is False: add --use_parallel True\n"
    assert not (tmp_path / "o").exists()


def test_an_adapter_to_go_on_from_is_looked_at_too(model, rows_file, tmp_path, capsys):
    base, config = load_directory(model), LoraConfig(4, 8.0, target_modules="q_proj", use_dora=True)
    inject(base, config)
    save_adapter(base, tmp_path / "dora", config)
    words = ["--load_checkpoint", str(model), "--train_dataset_dir", str(rows_file), "--use_parallel", "True"]
    assert main(["finetune", *words, f"--{KEY}", "2", "--load_adapter", str(tmp_path / "dora")]) == 2
    assert capsys.readouterr().err == WITHOUT.format("use_dora") + "\n"


@pytest.mark.parametrize(("command", "words"), [("predict", ["--predict_data", "Hello"]), ("chat", [])])
def test_answers_need_the_whole_model(text_model, capsys, command, words):
    flags = ["--load_checkpoint", str(text_model), "--use_parallel", "True", f"--{KEY}", "2"]
    assert main([command, *flags, *words]) == 2
    assert capsys.readouterr().err == (
        f"error: {KEY} 2: {command} runs with the whole model in each process; set it to 1\n"
    )


@pytest.mark.parametrize(
    ("options", "runtime", "lines"),
    [
        ([], Runtime("CPU"), []),
        ([f"{KEY}=8"], Runtime("CPU"), [f"{KEY} 8 has no effect: use_parallel is False"]),
        (["use_parallel=True"], Runtime("CPU", 0, 4), ["processes: 4 data-parallel x 1 model-parallel"]),
        (
            ["use_parallel=True", "parallel_config.data_parallel=8"],
            Runtime("CPU", 3, 4, Shard(1, 2, "x")),
            ["processes: 2 data-parallel x 2 model-parallel (parallel_config.data_parallel is 8)"],
        ),
    ],
)
def test_notices(options, runtime, lines):
    assert layout_notices(load_config(None, options=options), runtime) == lines


def test_places_of_the_ranks():
    """Eight processes, four to a model: neighbours share it, and see the same rows."""
    ranks = [Runtime("CPU", rank, 8, Shard(rank % 4, 4, "x")) for rank in range(8)]
    assert [(r.data_rank, r.shard.index) for r in ranks] == [(rank // 4, rank % 4) for rank in range(8)]
    assert {r.data_ranks for r in ranks} == {2}
