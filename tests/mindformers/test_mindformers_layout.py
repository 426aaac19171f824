"""Joint matrices: our order of rows against the functions with which MindFormers makes them."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lora_ms.bridge.layout import Heads, inverse

pytestmark = pytest.mark.mindformers

RNG = np.random.default_rng(4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_q_k_and_v(packages, heads, kv_heads):
    from mindformers.utils.convert_utils import qkv_concat_hf2mg

    width = 8 * heads
    for shape in ((), (5,)):  # a bias, and columns of a weight
        q, k, v = (RNG.standard_normal((8 * n, *shape)) for n in (heads, kv_heads, kv_heads))
        parts = np.concatenate((q, k, v))
        theirs = qkv_concat_hf2mg(parts, heads, kv_heads, width)
        order = Heads(heads, kv_heads, 8).order("self_attn.qkv_proj", len(parts))
        assert_array_equal(parts[order], theirs)
        assert_array_equal(theirs[inverse(order)], parts)


def test_gate_and_up(packages):
    from mindformers.utils.convert_utils import ffn_concat_hf2mg

    parts = RNG.standard_normal((14, 5))
    order = Heads(4, 2, 8).order("mlp.gate_up_proj", 14)
    assert_array_equal(parts[order], ffn_concat_hf2mg(parts, 7))
