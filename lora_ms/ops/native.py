"""The operators of ``ops/csrc`` as MindSpore's custom operators.

All take and give float32, but for indices, and for right factors of products and the weight of ``adapted``, which may
be float16.

MindSpore's own operators on the CPU are one pass over memory each, and its matrix products pack both factors anew.
These fuse what belongs together, leave a causal mask's other half out, and keep nothing but what they return.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

RIGHT_FACTORS = (ms.float32, ms.float16)  # types of right factors that these operators read

_library = ""


def use(library: str) -> None:
    """Cells made from now on compute with ``library``, or, where it is empty, with MindSpore's operators."""
    global _library
    _library = library


def there() -> bool:
    """Whether cells take these operators; asked once, when a cell is made."""
    return _library != ""


@cache
def _custom(library: str, name: str, shapes: Callable, outputs: int) -> ops.Custom:
    types = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    return ops.Custom(f"{library}:{name}", shapes, types, "aot")


def _operator(name: str, shapes: Callable[..., Sequence], outputs: int = 1) -> Any:
    """None where there are no operators. shapes: from those of the inputs to that of the output, or to a tuple."""
    return _custom(_library, name, shapes, outputs) if there() else None


def _times_transposed(a, b, *_):
    return [a[0], b[0]]


def _times(a, b, *_):
    return [a[0], b[1]]


def _transposed_times(a, b, *_):
    return [a[1], b[1]]


def times_transposed() -> Any:
    """(a [m, k], b [n, k], a2, b2, …, start [m, n] or [n], if any) -> start + a b^T + a2 b2^T + … [m, n]."""
    return _operator("times_transposed", _times_transposed)


def times() -> Any:
    """(a [m, k], b [k, n], a2, b2, …, start, if any) -> start + a b + a2 b2 + … [m, n]."""
    return _operator("times", _times)


def transposed_times() -> Any:
    """(a [k, m], b [k, n]) -> a^T b [m, n]."""
    return _operator("transposed_times", _transposed_times)


def _adapted(x, weight, a, *_):
    return [x[0], weight[0]], [x[0], a[0]]


def adapted() -> Any:
    """(x [t, in], W [out, in], A [rank, in], B [out, rank], scaling []) -> x W^T + low B^T, low = scaling x A^T.

    One product, whose inner dimension is longer by the rank: [t, out]; and low [t, rank]. With rows [t], columns [in]
    of ``Draws`` and [rate, 1 / (1 - rate)] besides, the x of A is dropped out.
    """
    return _operator("adapted", _adapted, 2)


def _adapted_gradient(grad, x, low, b, *_):
    return list(low), [low[1], x[1]], list(b)


def adapted_gradient() -> Any:
    """(d_y [t, out], x [t, in], low [t, rank], B [out, rank], scaling []) -> d_low = scaling d_y B, d_A, d_B.

    With dropout, rows, columns and rate besides.
    """
    return _operator("adapted_gradient", _adapted_gradient, 3)


def _input_gradient(grad, weight, *_):
    return [grad[0], weight[1]]


def dropped_gradient() -> Any:
    """(d_y [t, out], W [out, in], d_low [t, rank], A [rank, in], rows, columns, rate) -> d_y W + dropout(d_low A)."""
    return _operator("dropped_gradient", _input_gradient)


def _like_first(x, *_):
    return list(x)


def _like_two(x, *_):
    return list(x), list(x)


def _of_rows(x, *_):
    return [x[0]], [x[0]], list(x)


def cross_entropy() -> Any:
    """(logits [c, v], targets [c] int32) -> losses [c], whether the target has the largest logit [c], d logits
    [c, v]; all 0 where a target is negative."""
    return _operator("cross_entropy", _of_rows, 3)


class RMSNormOperator(nn.Cell):
    """``RMSNormKernel`` for float32 x [t, h]."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = Tensor([eps], ms.float32)
        self.forward = _operator("norm", _like_first)
        self.gradient = _operator("norm_gradient", _like_first)
        self.weight_gradient = _operator("norm_weight_gradient", lambda x, *_: [x[1]])

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x, weight.astype(ms.float32), self.eps)

    def bprop(self, x, weight, out, dout):
        dx = self.gradient(x, weight.astype(ms.float32), self.eps, dout)
        return dx, self.weight_gradient(x, self.eps, dout).astype(weight.dtype)


class GatedSiLUOperator(nn.Cell):
    """``GatedSiLUKernel`` for float32."""

    def __init__(self):
        super().__init__()
        self.forward, self.gradient = _operator("gated", _like_first), _operator("gated_gradient", _like_two, 2)

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.forward(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.gradient(gate, up, dout)


def _attended(q, k, v, cos, sin, first):
    return list(q), [q[0], q[1] // cos[1]]


def _like_three(q, k, v, *_):
    return list(q), list(k), list(v)


class CausalAttentionOperator(nn.Cell):
    """Rotary positions, causal attention scaled by 1/sqrt(d), and nothing of [s, s] kept.

    q [b * s, n_h * d], k, v [b * s, n_kv * d], not rotated; cos, sin [b * s * n, d], a token's n rows equal, the minus
    sign of the rotation in the first half of sin; first [b, s] int32: the earliest key that a query sees, in its line
    -> [b * s, n_h * d] and the logarithm of each query's sum of exponentials [b * s, n_h].
    """

    def __init__(self):
        super().__init__()
        self.forward = _operator("attention", _attended, 2)
        self.gradient = _operator("attention_gradient", _like_three, 3)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.forward(q, k, v, cos, sin, first)

    def bprop(self, q, k, v, cos, sin, first, out, dout):
        dq, dk, dv = self.gradient(q, k, v, cos, sin, first, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(first)


def _like_three_vectors(old, *_):
    return list(old), list(old), list(old)


def adamw() -> Any:
    """(old, grad, exp_avg, exp_avg_sq [n], rate, decay [n] or [], step [7]) -> old, exp_avg, exp_avg_sq after a step.

    step: the gradient's factor; 1, or 0 where the moments shall stay; 1 - beta1, 1 - beta2, 1 / (1 - beta1^count),
    1 / sqrt(1 - beta2^count); eps.
    """
    return _operator("adamw", _like_three_vectors, 3)


def _rows_of_heads(k, v, cos, *_):
    return [k[0] * k[1] // cos[1], cos[1]], [k[0] * k[1] // cos[1], cos[1]]


def cache_rows() -> Any:
    """(k, v, cos, sin, first), as ``CausalAttentionOperator`` takes them -> k, rotated, and v, as ``KVCache`` has them.

    Both [b * n_kv * s, d].
    """
    return _operator("cache_rows", _rows_of_heads, 2)


def attend_cache() -> Any:
    """(q [b, n_h * d], keys, values [b * n_kv, length, d], cos, sin [b * n, d], first [b, 1], rows [n]) -> like q.

    Attention of one new token of each line, in slot ``rows[0]`` of the cache, to those from slot ``first`` on.
    """
    return _operator("attend_cache", _like_first)


class MatMul(nn.Cell):
    """A product in the type of ``a``, in float32 by these operators, where they are there, else by MindSpore's.

    kind: ``times``, ``times_transposed`` or ``transposed_times``, as the functions of these names. It has no gradient.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.there = there()
        self.own = {"times": times, "times_transposed": times_transposed, "transposed_times": transposed_times}[kind]()
        self.plain = ops.MatMul(kind == "transposed_times", kind == "times_transposed")

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        if self.there and a.dtype == ms.float32 and b.dtype in RIGHT_FACTORS:
            return self.own(a, b)
        if a.dtype != b.dtype:
            b = ops.depend(b, a).astype(a.dtype)  # not before a is there
        return self.plain(a, b)
