"""The C++ operators of ``ops/csrc`` as MindSpore's custom operators.

They compute in float32 and give the type of their input; right factors of products may be float16 or bfloat16, and are
widened as they are used. Products with weights may, on request, round both factors to bfloat16 where the processor
multiplies such numbers (``rounding``: ROUNDED in place of ""). MindSpore's own operators on the CPU are one pass over
memory each, and its matrix products pack both factors anew. These fuse what belongs together, leave out the half of a
causal mask that nothing sees, and keep nothing but what they return.

Every class takes the path of the compiled library first.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.ops import portable
from lora_ms.ops.dynamic_map import dynamic_map, thresholds

RIGHT_FACTORS = (ms.float32, ms.float16, ms.bfloat16)  # types of right factors that these operators read
ROUNDED = "_bfloat16"  # end of the names of products that round both factors


@cache
def operator(library: str, name: str, shapes: Callable, outputs: int = 1) -> Any:
    """The operator ``name``; shapes: from those of the inputs to that of the output, or to a tuple of ``outputs``."""
    types = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    return ops.Custom(f"{library}:{name}", shapes, types, "aot")


def right_factor(weight: Tensor) -> Tensor:
    """A weight in a type that the operators read."""
    return weight if weight.dtype in RIGHT_FACTORS else weight.astype(ms.float32)


def four_bits(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, ...]:
    """A weight of four bits as the operators take it: NF4 has no zeros."""
    return (codes, scales) if zeros is None else (codes, scales, zeros)


# The shapes of outputs from those of inputs.


def _times_four_bits(grad, codes, *_):
    return [grad[0], 2 * codes[0] * codes[1] // grad[1]]


def _times_four_bits_transposed(x, codes, *_):
    return [x[0], 2 * codes[0] * codes[1] // x[1]]


def _times_transposed(a, b, *_):
    return [a[0], b[0]]


def _times(a, b, *_):
    return [a[0], b[1]]


def _transposed_times(a, b, *_):
    return [a[1], b[1]]


def _adapted_gradient(grad, x, low, b, *_):
    return list(low), [low[1], x[1]], list(b)


def _like_first(x, *_):
    return list(x)


def _like_two(x, *_):
    return list(x), list(x)


def _like_three(x, y, z, *_):
    return list(x), list(y), list(z)


def _embedding(ids, weight):
    return [ids[0], weight[1]]


def _columns_of_first(x, *_):
    return [x[1]]


def _cross_entropy(logits, *_):
    return [logits[0]], [logits[0]], list(logits)


def _attention(q, k, v, cos, *_):
    return list(q), [q[0], q[1] // cos[1]]


class Product(nn.Cell):
    """``x W^T`` for x [t, in] and W [out, in]."""

    def __init__(self, library: str, rounding: str = ""):
        super().__init__()
        self.forward = operator(library, f"times_transposed{rounding}", _times_transposed)
        self.input_gradient = operator(library, f"times{rounding}", _times)
        self.weight_gradient = operator(library, "transposed_times", _transposed_times)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x.astype(ms.float32), right_factor(weight)).astype(x.dtype)

    def bprop(self, x, weight, out, dout):
        grad = dout.astype(ms.float32)
        d_x = self.input_gradient(grad, right_factor(weight)).astype(x.dtype)
        return d_x, self.weight_gradient(grad, x.astype(ms.float32))


class ProductBack(nn.Cell):
    """``dy W`` for dy [t, out] and W [out, in]; it has no gradient."""

    def __init__(self, library: str, rounding: str = ""):
        super().__init__()
        self.forward = operator(library, f"times{rounding}", _times)

    def construct(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self.forward(grad.astype(ms.float32), right_factor(weight)).astype(grad.dtype)


class AdaptedProduct(nn.Cell):
    """``x W^T + scaling dropout(x) A^T B^T``, as one product whose inner dimension is longer by the rank.

    x [t, in], W [out, in], A [rank, in], B [out, rank], scaling [], not trained. rows [t, 1], columns [1, in]: the
    random numbers of ``portable.Dropout``, whose zeros are the same; None for no dropout. No mask and no dropped input
    are kept for the gradient: both are formed again.
    """

    def __init__(self, library: str, rounding: str, dropout: float):
        super().__init__()
        self.product = _AdaptedProduct(library, rounding, dropout)

    def construct(
        self,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        wide = (x.astype(ms.float32), right_factor(weight), a.astype(ms.float32), b.astype(ms.float32))
        y = self.product(*wide, scaling.astype(ms.float32), rows, columns)[0]
        return y.astype(x.dtype)


class _AdaptedProduct(nn.Cell):
    """``AdaptedProduct`` in float32 [t, out], and scaling dropout(x) A^T [t, rank], which the gradient needs.

    Two operators: where the gradient is taken from kept inputs, the small one alone is run again.
    """

    def __init__(self, library: str, rounding: str, dropout: float):
        super().__init__()
        self.rate = Tensor([dropout, 1.0 / (1.0 - dropout)], ms.float32)
        self.low = operator(library, "low_rank_input", _times_transposed)
        self.forward = operator(library, f"times_transposed{rounding}", _times_transposed)
        self.factors = operator(library, "adapted_product_gradient", _adapted_gradient, 3)
        self.times = operator(library, f"times{rounding}", _times)
        self.dropped_gradient = operator(library, f"dropped_input_gradient{rounding}", _times)
        self.transposed_times = operator(library, "transposed_times", _transposed_times)

    def construct(
        self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        dropout = () if rows is None else (rows, columns, self.rate)
        low = self.low(x, a, scaling, *dropout)
        return self.forward(x, weight, low, b), low

    def bprop(self, x, weight, a, b, scaling, rows, columns, out, dout):
        grad = dout[0]
        inputs = (grad, x, out[1], b, scaling)
        d_weight = self.transposed_times(grad, x).astype(weight.dtype)
        if rows is None:
            d_low, d_a, d_b = self.factors(*inputs)
            d_x = self.times(grad, weight, d_low, a)
            return d_x, d_weight, d_a, d_b, ops.zeros_like(scaling), 0, 0
        dropout = (rows, columns, self.rate)
        d_low, d_a, d_b = self.factors(*inputs, *dropout)
        d_x = self.dropped_gradient(grad, weight, d_low, a, *dropout)
        return d_x, d_weight, d_a, d_b, ops.zeros_like(scaling), ops.zeros_like(rows), ops.zeros_like(columns)


class FourBitsBack(nn.Cell):
    """``dy W`` for dy [t, out] and W [out, in] of four bits a number, decoded as it is packed; it has no gradient.

    kind: "nf4" of codes [out, in / 2] and the largest size of each block; "int4" of codes, scales and zeros.
    """

    def __init__(self, library: str, rounding: str, kind: str):
        super().__init__()
        self.forward = operator(library, f"{kind}_times{rounding}", _times_four_bits)

    def construct(self, grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        return self.forward(grad.astype(ms.float32), *four_bits(codes, scales, zeros)).astype(grad.dtype)


class FourBitsProduct(nn.Cell):
    """``x W^T`` for x [t, in] and W as ``FourBitsBack`` takes it, which has no gradient."""

    def __init__(self, library: str, rounding: str, kind: str):
        super().__init__()
        self.product = _FourBitsProduct(library, rounding, kind)

    def construct(self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        return self.product(x.astype(ms.float32), codes, scales, zeros).astype(x.dtype)


class _FourBitsProduct(nn.Cell):
    def __init__(self, library: str, rounding: str, kind: str):
        super().__init__()
        self.forward = operator(library, f"{kind}_times_transposed{rounding}", _times_four_bits_transposed)
        self.times = operator(library, f"{kind}_times{rounding}", _times_four_bits)

    def construct(self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return self.forward(x, *four_bits(codes, scales, zeros))

    def bprop(self, x, codes, scales, zeros, out, dout):
        weight = four_bits(codes, scales, zeros)
        none = 0 if zeros is None else ops.zeros_like(zeros)
        return self.times(dout, *weight), ops.zeros_like(codes), ops.zeros_like(scales), none


class NF4AdaptedProduct(nn.Cell):
    """``AdaptedProduct`` of a weight in NF4."""

    def __init__(self, library: str, rounding: str, dropout: float):
        super().__init__()
        self.product = _FourBitsAdaptedProduct(library, rounding, "nf4", dropout)

    def construct(
        self,
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        weight = (codes, absmax, None)
        factors = (a.astype(ms.float32), b.astype(ms.float32), scaling.astype(ms.float32))
        return self.product(x.astype(ms.float32), *weight, *factors, rows, columns)[0].astype(x.dtype)


class Int4AdaptedProduct(nn.Cell):
    """``AdaptedProduct`` of a weight of four bits in groups."""

    def __init__(self, library: str, rounding: str, dropout: float):
        super().__init__()
        self.product = _FourBitsAdaptedProduct(library, rounding, "int4", dropout)

    def construct(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        weight = (codes, scales, zeros)
        factors = (a.astype(ms.float32), b.astype(ms.float32), scaling.astype(ms.float32))
        return self.product(x.astype(ms.float32), *weight, *factors, rows, columns)[0].astype(x.dtype)


class _FourBitsAdaptedProduct(nn.Cell):
    """``_AdaptedProduct`` with a weight as ``FourBitsBack`` takes it, which has no gradient."""

    def __init__(self, library: str, rounding: str, kind: str, dropout: float):
        super().__init__()
        self.rate = Tensor([dropout, 1.0 / (1.0 - dropout)], ms.float32)
        self.low = operator(library, "low_rank_input", _times_transposed)
        self.forward = operator(library, f"{kind}_times_transposed{rounding}", _times_four_bits_transposed)
        self.factors = operator(library, "adapted_product_gradient", _adapted_gradient, 3)
        self.times = operator(library, f"{kind}_times{rounding}", _times_four_bits)
        self.dropped_gradient = operator(library, f"{kind}_dropped_input_gradient{rounding}", _times_four_bits)

    def construct(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dropout = () if rows is None else (rows, columns, self.rate)
        low = self.low(x, a, scaling, *dropout)
        return self.forward(x, *four_bits(codes, scales, zeros), low, b), low

    def bprop(self, x, codes, scales, zeros, a, b, scaling, rows, columns, out, dout):
        grad, weight = dout[0], four_bits(codes, scales, zeros)
        inputs = (grad, x, out[1], b, scaling)
        frozen = (ops.zeros_like(codes), ops.zeros_like(scales), 0 if zeros is None else ops.zeros_like(zeros))
        if rows is None:
            d_low, d_a, d_b = self.factors(*inputs)
            return self.times(grad, *weight, d_low, a), *frozen, d_a, d_b, ops.zeros_like(scaling), 0, 0
        dropout = (rows, columns, self.rate)
        d_low, d_a, d_b = self.factors(*inputs, *dropout)
        d_x = self.dropped_gradient(grad, *weight, d_low, a, *dropout)
        return d_x, *frozen, d_a, d_b, ops.zeros_like(scaling), ops.zeros_like(rows), ops.zeros_like(columns)


class RowUpdates(nn.Cell):
    """``y + x A^T B``, with the A and B of each token's line: see ``portable.RowUpdates``. It has no gradient."""

    def __init__(self, library: str):
        super().__init__()
        self.forward = operator(library, "row_updates", _like_first)

    def construct(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, choice: Tensor) -> Tensor:
        return self.forward(y.astype(ms.float32), x.astype(ms.float32), a, b, choice).astype(y.dtype)


class EmbeddingRows(nn.Cell):
    """ids [t] int32 and the weight [v, h] -> its rows [t, h]: of bfloat16, which MindSpore does not gather on the CPU,
    in float32 and without a gradient."""

    def __init__(self, library: str):
        super().__init__()
        self.rows = _FrozenRows(library)

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        if weight.dtype == ms.bfloat16:
            return self.rows(ids.astype(ms.int32), weight)
        return ops.gather(weight, ids, 0)


class _FrozenRows(nn.Cell):
    """``EmbeddingRows`` of a weight that does not train."""

    def __init__(self, library: str):
        super().__init__()
        self.forward = operator(library, "embedding", _embedding)

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        return self.forward(ids, weight)

    def bprop(self, ids, weight, out, dout):
        return ops.zeros_like(ids), ops.zeros_like(weight)


class RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; x [t, h], weight [h]."""

    def __init__(self, library: str, eps: float):
        super().__init__()
        self.eps = Tensor([eps], ms.float32)
        self.forward = operator(library, "rms_norm", _like_first)
        self.input_gradient = operator(library, "rms_norm_gradient", _like_first)
        self.weight_gradient = operator(library, "rms_norm_weight_gradient", _columns_of_first)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x.astype(ms.float32), weight.astype(ms.float32), self.eps).astype(x.dtype)

    def bprop(self, x, weight, out, dout):
        y = x.astype(ms.float32)
        grad = dout.astype(ms.float32)
        d_x = self.input_gradient(y, weight.astype(ms.float32), self.eps, grad).astype(x.dtype)
        return d_x, self.weight_gradient(y, self.eps, grad).astype(weight.dtype)


class GatedSiLU(nn.Cell):
    """``silu(gate) * up``, with ``silu(z) = z sigmoid(z)``, elementwise."""

    def __init__(self, library: str):
        super().__init__()
        self.forward = operator(library, "gated_silu", _like_first)
        self.gradient = operator(library, "gated_silu_gradient", _like_two, 2)

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.forward(gate.astype(ms.float32), up.astype(ms.float32)).astype(gate.dtype)

    def bprop(self, gate, up, out, dout):
        d_gate, d_up = self.gradient(gate.astype(ms.float32), up.astype(ms.float32), dout.astype(ms.float32))
        return d_gate.astype(gate.dtype), d_up.astype(up.dtype)


class FirstKeys(nn.Cell):
    """``first`` as it is: the attention here reads it itself."""

    def construct(self, first: Tensor, start: Tensor | None = None) -> Tensor:
        return first


class Attention(nn.Cell):
    """Rotary positions and causal attention over tokens, scaled by 1/sqrt(d); nothing of [s, s] is kept.

    q [t, n_h * d], k, v [t, n_kv * d], not rotated -> [t, n_h * d]; rope as ``portable.Attention`` takes it, of which
    the keys' tables are read; visible: ``first``, int32 [b, s].
    """

    KEPT = 1  # the logarithms of each query's sum of exponentials, [t, n_h]

    def __init__(self, library: str):
        super().__init__()
        self.attention = _Attention(library)
        self.known_attention = _KnownAttention(library)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor) -> Tensor:
        return self.attention(q, k, v, rope[2], rope[3], visible)[0]

    def keeping(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the sums."""
        return self.attention(q, k, v, rope[2], rope[3], visible)

    def known(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor, kept: tuple) -> Tensor:
        """The output, of what ``keeping`` gave."""
        inputs = (q, k, v, rope[2], rope[3], visible)
        return self.known_attention(*inputs, *kept)


class _Attention(nn.Cell):
    """``Attention``, and the logarithm of each query's sum of exponentials [t, n_h], which the gradient needs.

    cos, sin [t * n_kv, d]: a token's rows are equal, and the minus sign of the rotation is in the first half of sin.
    """

    def __init__(self, library: str):
        super().__init__()
        self.forward = operator(library, "attention", _attention, 2)
        self.gradient = operator(library, "attention_gradient", _like_three, 3)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.forward(q, k, v, cos, sin, first)

    def bprop(self, q, k, v, cos, sin, first, out, dout):
        inputs = (q, k, v, cos, sin, first)
        dq, dk, dv = self.gradient(*inputs, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(first)


class _KnownAttention(nn.Cell):
    """``_Attention`` whose output and sums are known: it gives the output, and has its gradient."""

    def __init__(self, library: str):
        super().__init__()
        self.gradient = operator(library, "attention_gradient", _like_three, 3)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, first: Tensor, mixed: Tensor, sums: Tensor
    ) -> Tensor:
        return mixed

    def bprop(self, q, k, v, cos, sin, first, mixed, sums, out, dout):
        inputs = (q, k, v, cos, sin, first)
        dq, dk, dv = self.gradient(*inputs, mixed, sums, dout)
        constants = (ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(first))
        return (dq, dk, dv) + constants + (ops.zeros_like(mixed), ops.zeros_like(sums))


class CachedAttention(nn.Cell):
    """Attention of new tokens to those in a cache, into which they are written; it has no gradient.

    cache: as ``portable.CachedAttention`` takes it; visible: ``first``, int32 [b, new]. Slots that are not in use yet
    cost nothing.
    """

    def __init__(self, library: str):
        super().__init__()
        self.attention = operator(library, "cached_attention", _like_first)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Tensor, cache: tuple) -> Tensor:
        keys, values, rows, begins = cache
        inputs = (q, k, v, keys, values)
        return self.attention(*inputs, rope[2], rope[3], visible, rows, begins)


class HeadProduct(nn.Cell):
    """hidden [c, h] and the head [v, h] -> logits [c, v] float32."""

    def __init__(self, library: str, rounding: str = ""):
        super().__init__()
        self.product = operator(library, f"times_transposed{rounding}", _times_transposed)

    def construct(self, hidden: Tensor, head: Tensor) -> Tensor:
        return self.product(hidden.astype(ms.float32), right_factor(head))


class HeadProductBack(nn.Cell):
    """probs [c, v] float32 and the head [v, h] -> probs head [c, h]."""

    def __init__(self, library: str, rounding: str = ""):
        super().__init__()
        self.product = operator(library, f"times{rounding}", _times)

    def construct(self, probs: Tensor, head: Tensor) -> Tensor:
        return self.product(probs, right_factor(head))


class CrossEntropy(nn.Cell):
    """``portable.CrossEntropy``, whose softmax, loss and gradient are one pass over the logits."""

    def __init__(self, library: str, rounding: str = ""):
        super().__init__()
        self.head_product = HeadProduct(library, rounding)
        self.head_product_back = HeadProductBack(library, rounding)
        self.cross_entropy = operator(library, "cross_entropy", _cross_entropy, 3)
        self.transposed_times = operator(library, "transposed_times", _transposed_times)

    def construct(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, right, d_logits = self.cross_entropy(self.head_product(hidden, head), targets)
        return loss.sum(), self.head_product_back(d_logits, head), right.sum()

    def head_gradient(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """d loss / d head [v, h] float32, whatever the head's type; the logits are computed again."""
        d_logits = self.cross_entropy(self.head_product(hidden, head), targets)[2]
        return self.transposed_times(d_logits, hidden.astype(ms.float32))


class AdamW(portable.AdamW):
    """``portable.AdamW`` in one pass over memory; the state is written where it lies."""

    NAME = "adamw"

    def __init__(self, library: str, beta1: float, beta2: float, eps: float):
        super().__init__(beta1, beta2, eps)
        self.step = operator(library, self.NAME, _like_first)
        self.stack = ops.Stack()
        self.tables: tuple[Tensor, ...] = ()

    def construct(
        self,
        old: Tensor,
        grad: Tensor,
        state: tuple[Parameter, ...],
        scale: Tensor,
        taken: Tensor,
        count: Tensor,
        rate: Tensor,
        decay: Tensor,
    ) -> Tensor:
        # in the order of `Step` in csrc/optimizer.h
        numbers = (scale, taken, *self.shares(), *self.corrections(count), Tensor(self.eps, ms.float32))
        vectors = (old, grad, *state, *self.tables)
        return self.step(*vectors, rate, decay, self.stack(numbers))


class AdamW8bit(AdamW):
    """``portable.AdamW8bit`` in one pass over memory."""

    NAME = "adamw_8bit"
    state_of = staticmethod(portable.AdamW8bit.state_of)

    def __init__(self, library: str, beta1: float, beta2: float, eps: float):
        super().__init__(library, beta1, beta2, eps)
        parts = [part(signed) for signed in (True, False) for part in (dynamic_map, thresholds)]
        self.tables = (Tensor(np.concatenate(parts)),)  # in the order of `Tables` in csrc/optimizer.h
