"""Products with weights in NF4 (see ``lora_ms.quant.nf4``), made of MindSpore's own operators, for any device.

A weight [out, in] is ``codes``, bytes of two numbers, in its order by rows, and ``absmax`` [numbers / 64, rounded up].
It is decoded for one product, and for the backward pass again: the inputs of a decoded weight are tied to what the
product waits for (``ops.depend``), so that the compiler neither decodes all weights at the start nor keeps one.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.ops.portable import Dropout, LowRankUpdate
from lora_ms.quant.nf4 import BLOCK, NESTED_BLOCK, PAIRS


class Spread(nn.Cell):
    """values [n] -> each of them ``times`` times, [size]: an outer product, for a broadcast would keep indices."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times
        self.outer = ops.MatMul()

    def construct(self, values: Tensor, size: int) -> Tensor:
        found = self.outer(values.reshape((-1, 1)), ops.ones((1, self.times), values.dtype)).reshape((-1,))
        return found if size == found.shape[0] else found[:size]


class NF4Absmax(nn.Cell):
    """absmax [n] as bytes, ``nested_codes`` [256], ``nested_absmax`` [n / 256, rounded up] and ``offset`` [1] ->
    ``nested_codes[byte] * nested_absmax + offset`` [n] float32; without a gradient."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()
        self.spread = Spread(NESTED_BLOCK)

    def construct(self, absmax: Tensor, nested_codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
        values = self.gather(nested_codes, absmax.astype(ms.int32), 0)
        return values * self.spread(nested_absmax, absmax.shape[0]) + offset

    def bprop(self, absmax, nested_codes, nested_absmax, offset, out, dout):
        return (
            ops.zeros_like(absmax),
            ops.zeros_like(nested_codes),
            ops.zeros_like(nested_absmax),
            ops.zeros_like(offset),
        )


class NF4Decode(nn.Cell):
    """codes, absmax -> the weight [out, in] float32; ``inputs`` is in."""

    def __init__(self):
        super().__init__()
        self.pairs = Tensor(PAIRS)  # the two numbers of a byte, [256, 2]
        self.gather = ops.Gather()
        self.spread = Spread(BLOCK)

    def construct(self, codes: Tensor, absmax: Tensor, inputs: int) -> Tensor:
        numbers = self.gather(self.pairs, codes.reshape((-1,)).astype(ms.int32), 0).reshape((-1,))
        return (numbers * self.spread(absmax, numbers.shape[0])).reshape((-1, inputs))


class NF4ProductBack(nn.Cell):
    """(dy [t, out], codes, absmax) -> dy W [t, in], in the type of dy; without a gradient."""

    def __init__(self):
        super().__init__()
        self.decode = NF4Decode()
        self.matmul = ops.MatMul()

    def construct(self, grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
        inputs = codes.size * 2 // grad.shape[1]
        weight = self.decode(ops.depend(codes, grad), ops.depend(absmax, grad), inputs)
        return self.matmul(grad, weight.astype(grad.dtype))


class NF4Product(nn.Cell):
    """(x [t, in], codes, absmax) -> x W^T [t, out], in the type of x; the weight has no gradient."""

    def __init__(self):
        super().__init__()
        self.decode = NF4Decode()
        self.matmul = ops.MatMul(transpose_b=True)
        self.back = NF4ProductBack()

    def construct(self, x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
        weight = self.decode(ops.depend(codes, x), ops.depend(absmax, x), x.shape[1])
        return self.matmul(x, weight.astype(x.dtype))

    def bprop(self, x, codes, absmax, out, dout):
        return self.back(dout, codes, absmax), ops.zeros_like(codes), ops.zeros_like(absmax)


class NF4AdaptedProduct(nn.Cell):
    """``x W^T + scaling dropout(x) A^T B^T``, as ``portable.AdaptedProduct``, for a weight in NF4."""

    def __init__(self, dropout: float):
        super().__init__()
        self.product = NF4Product()
        self.low_rank = LowRankUpdate()
        self.dropout = Dropout(dropout)

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
        seen = x if rows is None else self.dropout(x, rows, columns)
        update = self.low_rank(seen, a, b, scaling)
        return self.product(x, codes, absmax) + update
