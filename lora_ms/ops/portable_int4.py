"""Products with weights of four bits in groups (see ``lora_ms.quant.int4``), for any device; as ``portable_nf4``.

A weight [out, in] is ``codes`` [out, in / 2], bytes of two numbers, and ``scales`` and ``zeros`` [out, groups].
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.ops.portable import Dropout, LowRankUpdate
from lora_ms.quant.int4 import PAIRS


class ColumnOrder(nn.Cell):
    """(x [t, n], order [n], inverse [n]) -> x[:, order]."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return self.gather(x, order, 1)

    def bprop(self, x, order, inverse, out, dout):
        return self.gather(dout, inverse, 1), ops.zeros_like(order), ops.zeros_like(inverse)


class Int4Decode(nn.Cell):
    """codes, scales, zeros -> the weight [out, in] float32."""

    def __init__(self):
        super().__init__()
        self.pairs = Tensor(PAIRS)  # the two numbers of a byte, [256, 2]
        self.gather = ops.Gather()
        self.outer = ops.MatMul()

    def construct(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        numbers = self.gather(self.pairs, codes.reshape((-1,)).astype(ms.int32), 0)
        size = codes.size * 2 // scales.size  # of a group
        ones = ops.ones((1, size), ms.float32)  # outer products in the place of broadcasts, which keep indices
        shift = self.outer(zeros.reshape((-1, 1)).astype(ms.float32), ones)
        factor = self.outer(scales.reshape((-1, 1)).astype(ms.float32), ones)
        return ((numbers.reshape((-1, size)) - shift) * factor).reshape((codes.shape[0], -1))


class Int4ProductBack(nn.Cell):
    """(dy [t, out], codes, scales, zeros) -> dy W [t, in], in the type of dy; without a gradient."""

    def __init__(self):
        super().__init__()
        self.decode = Int4Decode()
        self.matmul = ops.MatMul()

    def construct(self, grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        weight = self.decode(ops.depend(codes, grad), ops.depend(scales, grad), ops.depend(zeros, grad))
        return self.matmul(grad, weight.astype(grad.dtype))


class Int4Product(nn.Cell):
    """(x [t, in], codes, scales, zeros) -> x W^T [t, out], in the type of x; the weight has no gradient."""

    def __init__(self):
        super().__init__()
        self.decode = Int4Decode()
        self.matmul = ops.MatMul(transpose_b=True)
        self.back = Int4ProductBack()

    def construct(self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        weight = self.decode(ops.depend(codes, x), ops.depend(scales, x), ops.depend(zeros, x))
        return self.matmul(x, weight.astype(x.dtype))

    def bprop(self, x, codes, scales, zeros, out, dout):
        d_x = self.back(dout, codes, scales, zeros)
        return d_x, ops.zeros_like(codes), ops.zeros_like(scales), ops.zeros_like(zeros)


class Int4AdaptedProduct(nn.Cell):
    """``x W^T + scaling dropout(x) A^T B^T``, as ``portable.AdaptedProduct``, for a weight in groups."""

    def __init__(self, dropout: float):
        super().__init__()
        self.product = Int4Product()
        self.low_rank = LowRankUpdate()
        self.dropout = Dropout(dropout)

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
        seen = x if rows is None else self.dropout(x, rows, columns)
        update = self.low_rank(seen, a, b, scaling)
        return self.product(x, codes, scales, zeros) + update
