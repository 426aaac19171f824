"""Rotary frequencies and tables against their formulas, pair by pair."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.nn.rope import RotaryTables, Rotation, inverse_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def plain(head_dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10000.0), (24, 1e6), (128, 500000.0)])
def test_default(head_dim, theta):
    found = inverse_frequencies(head_dim, theta)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, plain(head_dim, theta), rtol=1e-12)


def test_linear():
    found = inverse_frequencies(16, 10000.0, {"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(found, [f / 4 for f in plain(16, 10000.0)], rtol=1e-12)


def test_llama3():
    """By wave length: kept below 8192 / 4, divided by 8 above 8192 / 1, blended between; all three occur."""
    wanted, kinds = [], set()
    for f in plain(128, 500000.0):
        wave = 2 * math.pi / f
        if wave < 8192 / 4:
            wanted.append(f)
            kinds.add("kept")
        elif wave > 8192 / 1:
            wanted.append(f / 8)
            kinds.add("slowed")
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            wanted.append((1 - smooth) * f / 8 + smooth * f)
            kinds.add("blended")
    assert kinds == {"kept", "slowed", "blended"}
    np.testing.assert_allclose(inverse_frequencies(128, 500000.0, LLAMA3), wanted, rtol=1e-12)


def test_tables(graph_mode):
    """One row a token and head; the query's are scaled by 1/sqrt(d), the sine's first half is negative."""
    head_dim, heads, kv_heads, positions = 8, 4, 2, [0, 1, 7, 300]
    inv_freq = inverse_frequencies(head_dim, 100.0)
    rotary = RotaryTables(head_dim, heads, kv_heads, Rotation(inv_freq), ms.float32)
    tables = rotary(Tensor(np.array(positions, np.int32)))
    cos = [[math.cos(p * f) for f in inv_freq] * 2 for p in positions]
    sin = [[-math.sin(p * f) for f in inv_freq] + [math.sin(p * f) for f in inv_freq] for p in positions]
    scale = 1 / math.sqrt(head_dim)
    wanted = [np.repeat(table, heads, 0) * scale for table in (cos, sin)]
    wanted += [np.repeat(table, kv_heads, 0) for table in (cos, sin)]
    for found, table in zip(tables, wanted, strict=True):
        np.testing.assert_allclose(found.asnumpy(), table, rtol=0, atol=2e-5)
