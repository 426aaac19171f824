"""Products with weights in half precision, beside activations in full.

MindSpore's kernels on the CPU do little in float16: each elementwise one keeps 16 bytes of index for every number, for
as long as the graph lives, and a matrix product makes float32 of both factors, of all weights before the first is used.
There, what flows between products is float32. Our own operators widen a weight as they use it; for MindSpore's it is
widened when it is needed, and for one product.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.ops import native as cpu
from lora_ms.ops.native import MatMul
from lora_ms.ops.portable import on_ascend

PART_NUMBERS = 1 << 24  # of the head that are widened at once: 64 MB


def stream_dtype(dtype: ms.Type) -> ms.Type:
    """The type of what flows between layers whose weights have ``dtype``."""
    return dtype if on_ascend() else ms.float32


class WeightMatMul(nn.Cell):
    """``x W^T`` for x [t, in] and W [out, in], in the type of x."""

    def __init__(self):
        super().__init__()
        self.product = MatMul("times")
        self.product_t = MatMul("times_transposed")
        self.t_product = MatMul("transposed_times")

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product_t(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.product(dout, weight), self.t_product(dout, x).astype(weight.dtype)


class AdaptedMatMul(nn.Cell):
    """``x W^T + scaling x A^T B^T`` by our own operators, as one product whose inner dimension is longer by the rank.

    x [t, in] float32, W [out, in], A [rank, in], B [out, rank], scaling [], not trained -> [t, out], and
    scaling x A^T [t, rank].
    """

    def __init__(self):
        super().__init__()
        self.forward, self.factors, self.times = cpu.adapted(), cpu.adapted_gradient(), cpu.times()
        self.transposed_times = cpu.transposed_times()

    def construct(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x, weight, a, b, scaling)

    def bprop(self, x, weight, a, b, scaling, out, dout):
        grad = dout[0]
        d_low, d_a, d_b = self.factors(grad, x, out[1], b, scaling)
        d_x = self.times(grad, weight, d_low, a)
        return d_x, self.transposed_times(grad, x).astype(weight.dtype), d_a, d_b, ops.zeros_like(scaling)


class DroppedMatMul(nn.Cell):
    """``AdaptedMatMul`` whose x of A is dropped out, by numbers of ``Draws``: rows [t, 1] and columns [1, in].

    Nothing of [t, in] is kept but x.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.rate = Tensor([probability, 1.0 / (1.0 - probability)], ms.float32)
        self.forward, self.factors, self.input = cpu.adapted(), cpu.adapted_gradient(), cpu.dropped_gradient()
        self.transposed_times = cpu.transposed_times()

    def construct(
        self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.forward(x, weight, a, b, scaling, rows, columns, self.rate)

    def bprop(self, x, weight, a, b, scaling, rows, columns, out, dout):
        grad = dout[0]
        d_low, d_a, d_b = self.factors(grad, x, out[1], b, scaling, rows, columns, self.rate)
        d_x = self.input(grad, weight, d_low, a, rows, columns, self.rate)
        d_weight = self.transposed_times(grad, x).astype(weight.dtype)
        return d_x, d_weight, d_a, d_b, ops.zeros_like(scaling), ops.zeros_like(rows), ops.zeros_like(columns)


class HeadProduct(nn.Cell):
    """The products with the head [v, h]; of one in float16, MindSpore's on the CPU take a widened part at a time."""

    def __init__(self):
        super().__init__()
        self.wide = not on_ascend()
        self.in_parts = self.wide and not cpu.there()
        self.product = MatMul("times")
        self.product_t = MatMul("times_transposed")

    def part(self, head: Tensor, start: int, rows: int, ready: Tensor) -> Tensor:
        """Rows of the head in float32, once ``ready`` is there; a gather, as slices are taken in float32 alone."""
        index = np.arange(start, min(start + rows, head.shape[0]), dtype=np.int32)
        # no number is above infinity; ops.depend on a parameter is optimised away
        nothing = (ready.reshape((-1,))[:1] > np.inf).astype(ms.int32)
        return ops.gather(head, Tensor(index, ms.int32) + nothing, 0).astype(ms.float32)

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """hidden [c, h] -> [c, v] float32."""
        if head.dtype == ms.float32 or not self.in_parts:
            return self.product_t(hidden.astype(ms.float32 if self.wide else head.dtype), head).astype(ms.float32)
        x, rows = hidden.astype(ms.float32), max(1, PART_NUMBERS // head.shape[1])
        parts: list[Tensor] = []
        for start in range(0, head.shape[0], rows):
            ready = parts[-1] if parts else x
            parts.append(self.product_t(x, self.part(head, start, rows, ready)))
        return ops.concat(parts, 1)

    def mixed(self, probs: Tensor, head: Tensor) -> Tensor:
        """probs [c, v] float32 -> probs head [c, h]."""
        if head.dtype == ms.float32 or not self.in_parts:
            return self.product(probs.astype(ms.float32 if self.wide else head.dtype), head)
        rows = max(1, PART_NUMBERS // head.shape[1])
        total = self.product(probs[:, :rows], self.part(head, 0, rows, probs))
        for start in range(rows, head.shape[0], rows):
            total = total + self.product(probs[:, start : start + rows], self.part(head, start, rows, total))
        return total


class WeightBias(nn.Cell):
    """``x + bias`` in the type of x."""

    def __init__(self):
        super().__init__()
        self.add = ops.BiasAdd()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.add(x, bias.astype(x.dtype))


class ProductDense(nn.Dense):
    """A dense layer by ``WeightMatMul``: its weight and bias may be in half precision where what flows is in full."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.matmul, self.bias_add = WeightMatMul(), WeightBias()
