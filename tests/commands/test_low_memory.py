"""``--low_memory``: what it stands for, and that it trains the same with less."""

import json

import numpy as np
import pytest

from lora_ms.cli.main import main
from lora_ms.config import load_config

DTYPE = "model.model_config.compute_dtype"


def test_what_it_stands_for():
    plain = load_config(None, options=["runner_config.batch_size=4"])
    low = load_config(None, flags={"context.low_memory": True, "runner_config.batch_size": 4})
    assert (plain.model.sizes.compute_dtype, low.model.sizes.compute_dtype) == (None, "float16")
    assert (plain.recompute_config.recompute, low.recompute_config.recompute) == (False, True)
    assert (plain.batch_size, low.batch_size) == (4, 1)
    assert low.batch_size * low.runner_config.gradient_accumulation_steps == 4


@pytest.mark.parametrize("options", [["context.low_memory=False"], []])
def test_without_it_nothing_changes(options):
    assert load_config(None, options=options).model.sizes.compute_dtype is None


def test_what_the_user_says_stays():
    options = ["context.low_memory=True", f"{DTYPE}=float32", "recompute_config.recompute=1"]
    options += ["runner_config={batch_size: 2, gradient_accumulation_steps: 3}"]
    config = load_config(None, options=options)
    assert (config.model.sizes.compute_dtype, config.recompute_config.recompute) == ("float32", 1)
    assert (config.batch_size, config.runner_config.gradient_accumulation_steps) == (1, 6)


def test_it_trains_the_same(model, rows_file, tmp_path, graph_mode):
    losses = {}
    for name, flags in (("plain", []), ("low", ["--low_memory", "True"])):
        command = ["finetune", "--load_checkpoint", str(model), "--train_dataset_dir", str(rows_file), *flags]
        command += ["--output_dir", str(tmp_path / name), "--device_target", "CPU", "--seq_length", "16"]
        command += ["--batch_size", "4", "--max_steps", "3", "--learning_rate", "0.01"]
        assert main([*command, "--model.model_config.pet_config.lora_dropout", "0"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["low"]) == 3
    np.testing.assert_allclose(losses["low"], losses["plain"], rtol=2e-3)


def test_plain_operators_on_a_card_that_fuses():
    """A norm made for low memory does without the fused operator, on Ascend too."""
    from lora_ms.ops import ascend, portable, select

    assert type(select("Ascend").rms_norm(1e-6)) is ascend.RMSNorm
    assert type(select("Ascend", plain=True).rms_norm(1e-6)) is portable.RMSNorm
