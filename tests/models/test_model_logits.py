"""Logits of every family against transformers', whole tensors."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.models.hub import load_directory

NAMES = ["llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen", "smollm3"]
pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module", params=NAMES)
def case(request, reference, golden, operators):
    return load_directory(reference / "models" / request.param, operators=operators), golden(f"logits_{request.param}")


def test_logits_without_a_mask(case):
    model, values = case
    logits = model(Tensor(values["input_ids"]))
    assert logits.dtype == ms.float32
    np.testing.assert_allclose(logits.asnumpy(), values["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_padded_rows(case, side):
    model, values = case
    mask = values[f"{side}_attention_mask"]
    logits = model(Tensor(values[f"{side}_input_ids"]), Tensor(mask)).asnumpy()
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits * mask[..., None], values[f"{side}_logits"], rtol=0, atol=1e-4)


def test_a_float16_model_is_float16_and_near(reference, golden, raw_tensors):
    path, values = reference / "models" / "qwen3", golden("logits_qwen3")
    model = load_directory(path, ms.float16)
    stored = raw_tensors(path)
    for name, parameter in model.parameters_and_names():
        assert parameter.dtype == ms.float16
        np.testing.assert_array_equal(parameter.asnumpy(), stored[name].astype(np.float16), err_msg=name)
    logits = model(Tensor(values["input_ids"]))
    assert logits.dtype == ms.float32
    np.testing.assert_allclose(logits.asnumpy(), values["logits"], rtol=0, atol=2e-2)
