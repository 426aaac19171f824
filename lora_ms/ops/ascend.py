"""Operators for Ascend cards. Written from MindSpore's documentation: none of this file has run on a card.

``PlainAttention`` and its like are portable arithmetic with the layout changes that suit a card; the 310B, which lacks
the fused operators in training, computes with them. ``RMSNorm`` and the flash attention are fused operators.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.ops import portable

FLASH_TYPES = (ms.float16, ms.bfloat16)  # types that are given to the fused attention


def stream_dtype(dtype: ms.Type) -> ms.Type:
    """The type of what flows between layers whose weights have ``dtype``."""
    return dtype


class RMSNorm(portable.RMSNorm):
    """The fused operator forward; the portable formula backward."""

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight.astype(x.dtype), self.eps)[0]


class Rotary(portable.Rotary):
    """Halves exchanged by slices, which are fast on a card."""

    def swap(self, x: Tensor) -> Tensor:
        return ops.concat((x[..., self.half :], x[..., : self.half]), -1)


class SwapAxes(portable.SwapAxes):
    """By a transposition."""

    def swap(self, x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        return x.reshape((batch, rows, columns, -1)).transpose((0, 2, 1, 3)).reshape((-1, x.shape[-1]))


class PlainAttention(portable.Attention):
    """The portable attention, with a card's layout changes."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.rotary = Rotary(head_dim)
        self.swap = SwapAxes()


class PlainCachedAttention(portable.CachedAttention):
    """The portable attention to a cache, with a card's layout changes."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.rotary = Rotary(head_dim)
        self.swap = SwapAxes()


class FlashMask(portable.ScoreMask):
    """first [b, s] -> 1 where a query may not look at a key, uint8 [b, 1, s, s], which all heads of a line share."""

    def construct(self, first: Tensor) -> Tensor:
        return self.hidden(first).astype(ms.uint8).expand_dims(1)


class FlashAttention(PlainAttention):
    """Attention by the fused operator, which keeps no [s, s] matrix; of FLASH_TYPES. visible: ``FlashMask``'s."""

    def construct(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor) -> Tensor:
        batch = visible.shape[0]
        q, k, v = self.by_heads(q, k, v, rope, batch)
        shape = (batch, -1, visible.shape[2], self.head_dim)
        output = flash(q.reshape(shape), k.reshape(shape), v.reshape(shape), visible, self.num_heads)
        return self.merge_heads(output, batch)


class FlashCachedAttention(PlainCachedAttention):
    """Attention to a cache by the fused operator. visible: the portable ``CachedScoreMask``'s."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.kernel = _FlashKernel()


class _FlashKernel(nn.Cell):
    """``SoftmaxAttention`` by the fused operator, without its gradient: queries that share a head are one head's."""

    def construct(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (visible < 0).astype(ms.uint8).expand_dims(1)  # [n, 1, m, s]
        output = flash(q.expand_dims(1), k.expand_dims(1), v.expand_dims(1), hidden, 1)
        return output.reshape(q.shape), q


def flash(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, heads: int) -> Tensor:
    """``ops.flash_attention_score`` of queries that are already scaled, [b, heads, s, d]."""
    return ops.flash_attention_score(query, key, value, heads, attn_mask=hidden, scalar_value=1.0, input_layout="BNSD")


class HeadProduct(nn.Cell):
    """hidden [c, h] and the head [v, h] -> logits [c, v] float32, multiplied in the head's type."""

    def __init__(self):
        super().__init__()
        self.product = portable.MatMul(transpose_b=True)

    def construct(self, hidden: Tensor, head: Tensor) -> Tensor:
        return self.product(hidden.astype(head.dtype), head).astype(ms.float32)


class HeadProductBack(nn.Cell):
    """probs [c, v] float32 and the head [v, h] -> probs head [c, h], multiplied in the head's type."""

    def __init__(self):
        super().__init__()
        self.product = portable.MatMul()

    def construct(self, probs: Tensor, head: Tensor) -> Tensor:
        return self.product(probs.astype(head.dtype), head)


class CrossEntropy(portable.CrossEntropy):
    """The portable cross-entropy, with products in the head's type."""

    def __init__(self):
        super().__init__()
        self.head_product = HeadProduct()
        self.head_product_back = HeadProductBack()
