"""Padding is zero from the embedding on, and real tokens have the numbers that they have without it."""

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.models.hub import load_directory


@pytest.mark.parametrize("real", [20, 40])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])  # qwen2 has biases, qwen3 norms inside the attention
def test_padding_is_zero_and_changes_nothing(native, reference, name, real):
    model = load_directory(reference / "models" / name, operators=native)
    ids = np.random.default_rng(0).integers(3, 90, (1, 48)).astype(np.int32)
    positions = np.where(np.arange(48) < real, np.arange(48), -1).astype(np.int32)[None]
    padded = model.hidden_states(Tensor(ids), Tensor(positions)).asnumpy()
    alone = model.hidden_states(Tensor(ids[:, :real]), Tensor(positions[:, :real])).asnumpy()
    np.testing.assert_array_equal(padded[:real], alone)
    assert not padded[real:].any()


def test_padding_sees_itself_where_a_softmax_wants_a_key(reference):
    model = load_directory(reference / "models" / "qwen2")
    ids = np.random.default_rng(0).integers(3, 90, (2, 6)).astype(np.int32)
    positions = np.array([[0, 1, 2, -1, -1, -1], [-1] * 6], np.int32)
    padded = model.hidden_states(Tensor(ids), Tensor(positions)).asnumpy()
    alone = model.hidden_states(Tensor(ids[:1, :3])).asnumpy()
    np.testing.assert_allclose(padded[:3], alone, atol=1e-5)
    assert np.isfinite(padded).all()
