"""A general attention mask: real tokens move to the left of their line, and their hidden states back."""

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.models.decoder import left_places
from lora_ms.models.hub import load_directory

MASK = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], np.int32)


def test_where_tokens_go(graph_mode):
    """Real tokens in their order, then the masked ones."""
    places = left_places(Tensor(MASK)).asnumpy().reshape(MASK.shape)
    wanted = [[3, 0, 4, 1, 2], [5, 6, 7, 8, 9], [10, 12, 13, 11, 14], [15, 16, 17, 18, 19]]
    np.testing.assert_array_equal(places, wanted)


@pytest.mark.parametrize("kind", [np.int32, np.bool_, np.float32])
def test_masked_tokens_anywhere_change_nothing(operators, reference, kind):
    """A line with holes has the logits of its real tokens alone."""
    model = load_directory(reference / "models" / "qwen2", operators=operators)
    ids = np.random.default_rng(0).integers(0, 120, MASK.shape).astype(np.int32)
    logits = model(Tensor(ids), Tensor(MASK.astype(kind))).asnumpy()
    assert np.isfinite(logits).all()
    for line, mask, found in zip(ids, MASK, logits, strict=True):
        real = mask == 1
        if real.any():
            alone = model(Tensor(line[real][None])).asnumpy()[0]
            np.testing.assert_allclose(found[real], alone, rtol=0, atol=1e-5)
