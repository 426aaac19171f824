"""What adapters do to the logits, against PEFT."""

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_format import load_adapter
from lora_ms.models.hub import load_directory

pytestmark = pytest.mark.usefixtures("graph_mode")


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "qwen2_all_linear"])
def test_pefts_adapters_loaded_and_merged(native, reference, golden, name):
    values = golden(f"adapter_logits_{name}")
    model = load_directory(reference / "models" / name.split("_")[0], operators=native)
    input_ids = Tensor(values["input_ids"])
    assert_near(model(input_ids).asnumpy(), values["base_logits"])
    load_adapter(model, reference / "adapters" / name)
    assert_near(model(input_ids).asnumpy(), values["logits"])
    swapped_out = adapted_layers(model).values()
    merge(model)
    for layer in swapped_out:  # a graph that still held them would show it
        layer.lora_b.set_data(Tensor(np.zeros(layer.lora_b.shape, np.float32)))
    assert_near(model(input_ids).asnumpy(), values["merged_logits"])


def test_a_fresh_adapter_changes_no_bit(native, reference, golden):
    model = load_directory(reference / "models" / "qwen2", operators=native)
    input_ids = Tensor(golden("adapter_logits_qwen2")["input_ids"])
    before = model(input_ids).asnumpy()
    inject(model, LoraConfig(4, 8.0, 0.3, "all-linear"))
    np.testing.assert_array_equal(model.set_train(False)(input_ids).asnumpy(), before)
    layer = adapted_layers(model)["model.layers.0.self_attn.v_proj"]  # and it is in the graph that has run
    layer.lora_b.set_data(Tensor(np.ones(layer.lora_b.shape, np.float32)))
    assert np.abs(model(input_ids).asnumpy() - before).max() > 0.1
