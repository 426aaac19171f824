"""What adapters do to the logits, against PEFT."""

import os
import subprocess

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.inject import inject, lora_layers
from lora_ms.adapters.merge import merge
from lora_ms.adapters.peft_format import load_adapter, save_adapter
from lora_ms.models.hub import load_directory

pytestmark = pytest.mark.usefixtures("graph_mode")


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "qwen2_all_linear"])
def test_pefts_adapters_loaded_and_merged(reference, golden, name):
    values = golden(f"adapter_logits_{name}")
    model, input_ids = load_directory(reference / "models" / name.split("_")[0]), Tensor(values["input_ids"])
    load_adapter(model, reference / "adapters" / name)
    assert_near(model(input_ids).asnumpy(), values["logits"])
    merge(model)
    assert_near(model(input_ids).asnumpy(), values["merged_logits"])


def test_a_fresh_adapter_changes_no_bit(reference, golden):
    model = load_directory(reference / "models" / "qwen2")
    input_ids = Tensor(golden("adapter_logits_qwen2")["input_ids"])
    before = model(input_ids).asnumpy()
    inject(model, LoraConfig(4, 8.0, 0.3, "all-linear"))
    np.testing.assert_array_equal(model.set_train(False)(input_ids).asnumpy(), before)


@pytest.mark.peft
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_peft_makes_the_same_of_our_adapter(reference, python_env, tmp_path, name):
    torch_python = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not torch_python:
        pytest.skip("LORA_MS_TORCH_PYTHON names no Python with torch and PEFT")
    source = reference / "models" / name
    model, config = load_directory(source), LoraConfig(4, 6.0, 0.1, ("q_proj", "k_proj", "o_proj", "up_proj"))
    inject(model, config)
    rng = np.random.default_rng(4)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor.set_data(Tensor(rng.standard_normal(factor.shape, np.float32) * 0.2))
    save_adapter(model, tmp_path / "adapter", config, str(source))
    paths = [reference / "live_peft.py", source, tmp_path / "adapter", tmp_path / "out.npz"]
    command = [torch_python, *map(str, paths)]
    child = subprocess.run(command, env={**python_env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "missing" not in child.stderr.lower()
    theirs = np.load(tmp_path / "out.npz")
    assert np.abs(theirs["logits"] - theirs["base_logits"]).mean() > 0.1
    input_ids = Tensor(theirs["input_ids"].astype(np.int32))
    assert_near(model.set_train(False)(input_ids).asnumpy(), theirs["logits"])
    assert_near(merge(model)(input_ids).asnumpy(), theirs["merged_logits"])
