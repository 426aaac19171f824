"""Products with weights in half precision, beside activations in full.

MindSpore's kernels on the CPU do little in float16: each elementwise one keeps 16 bytes of index for every number, for
as long as the graph lives, and a matrix product makes float32 of both factors, of all weights before the first is used.
There, what flows between products is float32, and a weight is widened when it is needed, and for one product.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.nn.kernels import on_ascend

PART_NUMBERS = 1 << 24  # of the head that are widened at once: 64 MB


def stream_dtype(dtype: ms.Type) -> ms.Type:
    """The type of what flows between layers whose weights have ``dtype``."""
    return dtype if on_ascend() else ms.float32


def widened(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` in the type of ``x``, once x is there."""
    return ops.depend(weight, x).astype(x.dtype) if weight.dtype != x.dtype else weight


class WeightMatMul(nn.Cell):
    """``x W^T`` for x [t, in] and W [out, in], in the type of x."""

    def __init__(self):
        super().__init__()
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)
        self.t_product = ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product_t(x, widened(weight, x))

    def bprop(self, x, weight, out, dout):
        return self.product(dout, widened(weight, dout)), self.t_product(dout, x).astype(weight.dtype)


class HeadProduct(nn.Cell):
    """The products with the head [v, h], of which a part is widened at a time where it is in half precision."""

    def __init__(self):
        super().__init__()
        self.wide = not on_ascend()
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)

    def part(self, head: Tensor, start: int, rows: int, ready: Tensor) -> Tensor:
        """Rows of the head in float32, once ``ready`` is there; a gather, as slices are taken in float32 alone."""
        index = np.arange(start, min(start + rows, head.shape[0]), dtype=np.int32)
        # no number is above infinity; ops.depend on a parameter is optimised away
        nothing = (ready.reshape((-1,))[:1] > np.inf).astype(ms.int32)
        return ops.gather(head, Tensor(index, ms.int32) + nothing, 0).astype(ms.float32)

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """hidden [c, h] -> [c, v] float32."""
        if head.dtype == ms.float32 or not self.wide:
            return self.product_t(hidden, head).astype(ms.float32)
        x, rows = hidden.astype(ms.float32), max(1, PART_NUMBERS // head.shape[1])
        parts: list[Tensor] = []
        for start in range(0, head.shape[0], rows):
            ready = parts[-1] if parts else x
            parts.append(self.product_t(x, self.part(head, start, rows, ready)))
        return ops.concat(parts, 1)

    def mixed(self, probs: Tensor, head: Tensor) -> Tensor:
        """probs [c, v] float32 -> probs head [c, h]."""
        if head.dtype == ms.float32 or not self.wide:
            return self.product(probs.astype(head.dtype), head)
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


class HalfDense(nn.Dense):
    """A dense layer whose weight and bias are in half precision, where what flows is in full."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.matmul, self.bias_add = WeightMatMul(), WeightBias()
