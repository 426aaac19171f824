"""Attention as a layer: its heads, against a loop over them in float64."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.nn import sharing
from lora_ms.nn.attention import Attention
from lora_ms.nn.layers import dense_projections
from lora_ms.ops import Operators


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def attend(q, k, v, visible):
    scores = q @ k.transpose(0, 2, 1) + visible
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return probs / probs.sum(-1, keepdims=True) @ v


def attention(operators: Operators, rotates: bool) -> Attention:
    """Four query heads of four channels on two key/value heads."""
    return Attention(
        hidden_size=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qkv_bias=False,
        qk_norm_eps=None,
        flash_attention=False,
        dtype=ms.float32,
        make=dense_projections(ms.float32, operators),
        operators=operators,
        rotates=rotates,
    )


@pytest.mark.parametrize("rotates", [True, False])
def test_grouped_heads(operators, rotates):
    """Heads 0 and 1 look at the first key/value head, 2 and 3 at the second. Tables matter to what rotates alone."""
    batch, seq, heads, kv_heads, d, hidden = 2, 3, 4, 2, 4, 5
    layer = attention(operators, rotates)
    weights = {
        "q": random(heads * d, hidden),
        "k": random(kv_heads * d, hidden),
        "v": random(kv_heads * d, hidden, seed=1),
        "o": random(hidden, heads * d),
    }
    for name, value in weights.items():
        layer.parameters_dict()[f"{name}_proj.weight"].set_data(Tensor(value))
    x = random(batch * seq, hidden, seed=9)
    # tables that rotate by nothing; the query's carry 1/sqrt(d)
    tables = ((heads, d**-0.5), (heads, 0), (kv_heads, 1), (kv_heads, 0))
    tables = [(n, number if rotates else 7.0) for n, number in tables]
    rope = tuple(Tensor(np.full((batch * seq * n, d), number, np.float32)) for n, number in tables)
    rope = (*rope, Tensor(np.tile(np.arange(seq, dtype=np.int32), batch)))
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads}
    visible = operators.visibility(**sizes, dtype=ms.float32, flash=False)(Tensor(np.zeros((batch, seq), np.int32)))
    found = layer(Tensor(x), rope, visible).asnumpy()
    wanted = np.zeros((batch, seq, heads * d))
    rows = x.reshape(batch, seq, hidden).astype(np.float64)
    for row in range(batch):
        for head in range(heads):
            kv = slice(head // 2 * d, head // 2 * d + d)
            own = slice(head * d, head * d + d)
            q, k, v = rows[row] @ weights["q"][own].T, rows[row] @ weights["k"][kv].T, rows[row] @ weights["v"][kv].T
            causal = np.where(np.tri(seq), 0, -1e9)
            wanted[row, :, own] = attend(q[None] / np.sqrt(d), k[None], v[None], causal)[0]
    np.testing.assert_allclose(found, wanted.reshape(-1, heads * d) @ weights["o"].T, rtol=0, atol=1e-5)


def test_a_layer_that_does_not_rotate_has_graphs_of_its_own(native):
    one, same, other = (sharing.kind_of([attention(native, rotates)]) for rotates in (True, True, False))
    assert one == same != other
