"""What a query sees, in all forms: rows of one line do not see each other, and a cache is seen as far as written."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from lora_ms.ops import ascend, portable

POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 2]], np.int32)


def visible(positions: np.ndarray) -> np.ndarray:
    """[s, s]: query i sees key j of its own row, up to itself."""
    rows = np.cumsum(positions == 0)
    return np.array([[rows[i] == rows[j] and j <= i for j in range(len(rows))] for i in range(len(rows))])


def test_the_table_of_one_line():
    assert visible(POSITIONS[0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_all_forms_say_the_same(native):
    num_heads, num_kv_heads = 4, 2
    wanted = np.stack([visible(line) for line in POSITIONS])
    first = Tensor(np.arange(6, dtype=np.int32) - POSITIONS)
    np.testing.assert_array_equal(first.asnumpy(), wanted.argmax(-1))
    np.testing.assert_array_equal(native.visibility()(first).asnumpy(), first.asnumpy())
    scores = portable.ScoreMask(num_heads, num_kv_heads)(first)
    assert scores.shape == (3 * num_kv_heads, 2 * 6, 6) and scores.dtype == ms.float32
    for line, block in zip(wanted, scores.asnumpy().reshape(3, num_heads, 6, 6), strict=True):
        for head in block:
            np.testing.assert_array_equal(head == 0, line)
            assert set(np.unique(head)) <= {np.float32(-1e9), np.float32(0)}
    fused = ascend.FlashMask(num_heads, num_kv_heads)(first)
    assert fused.shape == (3, 1, 6, 6) and fused.dtype == ms.uint8
    np.testing.assert_array_equal(fused.asnumpy()[:, 0] == 0, wanted)


def test_what_new_tokens_see_in_a_cache(native):
    """Slots 2 and 3 of a cache of 6 are written. The second line begins at slot 3, so that slot 2 is padding there."""
    first, start = Tensor(np.array([[0, 0], [2, 3]], np.int32)), Tensor(2, ms.int32)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "length": 6}
    np.testing.assert_array_equal(native.cached_visibility(**sizes)(first, start).asnumpy(), first.asnumpy())
    scores = portable.CachedScoreMask(**sizes)(first, start).asnumpy()
    assert scores.shape == (2 * 2, 2 * 2, 6)
    seen = [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]]
    for line, block in zip(seen, scores.reshape(2, 4, 2, 6), strict=True):
        for head in block:
            np.testing.assert_array_equal(head == 0, np.array(line, bool))
