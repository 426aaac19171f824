"""``pet_type: ia3`` from the command line: a run, its resumption, and runs that go on from an adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_ms.cli import main as cli

K0 = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
RUN = """
runner_config: {batch_size: 2, epochs: 2}
lr_schedule: {type: ConstantWarmUpLR, learning_rate: 2.e-2}
callbacks: [{type: CheckpointMonitor, save_checkpoint_steps: 4}]
model: {model_config: {seq_length: 16}}
pet_config: {pet_type: ia3, modules_to_save: [model.norm]}
"""


@pytest.fixture(scope="module")
def words(text_model, rows_file, tmp_path_factory) -> list[str]:
    """Arguments of a run of eight steps of two rows."""
    config = tmp_path_factory.mktemp("config") / "run.yaml"
    config.write_text(RUN)
    return [
        "finetune",
        "--config",
        str(config),
        "--load_checkpoint",
        str(text_model),
        "--train_dataset_dir",
        str(rows_file),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory, graph_mode) -> Path:
    """A run to its end."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*words, "--output_dir", str(folder)]) == 0
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run(whole):
    lines = (whole / "run.log").read_text()
    assert "IA3 on 6 modules: 384 of " in lines  # 320 in vectors, 64 of the norm
    found = losses(whole)
    assert len(found) == 8 and found[-1] < found[0]
    stored = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 7 and np.abs(stored[K0] - 1).max() > 1e-3


def test_a_resumed_run_is_the_same(words, whole, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step_8", ignore_errors=True)
    assert cli.main([*words, "--output_dir", str(folder), "--resume_training", "step_4"]) == 0
    for name, value in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(load_file(folder / "adapter" / "adapter_model.safetensors")[name], value)


def test_a_run_that_goes_on(words, whole, tmp_path, capsys):
    adapter = ["--load_adapter", str(whole / "adapter")]
    assert cli.main([*words, *adapter, "--output_dir", str(tmp_path)]) == 0
    assert losses(tmp_path)[0] < losses(whole)[0]
    capsys.readouterr()
    flags = ["--pet_config.feedforward_modules", "[]"]
    assert cli.main([*words, *adapter, *flags, "--output_dir", str(tmp_path)]) == 2
    assert "feedforward of model.layers.0.mlp.down_proj: False in pet_config, True in the adapter" in (
        capsys.readouterr().err
    )


def test_an_adapter_of_another_method_is_refused(words, reference, tmp_path, capsys):
    adapter = ["--load_adapter", str(reference / "adapters" / "qwen2")]
    assert cli.main([*words, *adapter, "--output_dir", str(tmp_path)]) == 2
    assert "pet_type: ia3 in pet_config, lora in the adapter" in capsys.readouterr().err
