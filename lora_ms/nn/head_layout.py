"""The order of tokens and heads: projections give a token's heads side by side, attention wants a head's tokens so."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.ops.portable import on_ascend


class SwapKernel(nn.Cell):
    """Exchanges the two middle axes of x [b, m, n, d], given as [b * m * n, d] -> [b * n * m, d].

    MindSpore's transposition on the CPU keeps an 8-byte index of every number for as long as the graph lives; a
    gather of rows needs one of 4 bytes for every row, and takes less than half the time.
    """

    def __init__(self):
        super().__init__()
        self.fused = on_ascend()
        self.gather = ops.Gather()

    def swap(self, x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        if self.fused:
            return x.reshape((batch, rows, columns, -1)).transpose((0, 2, 1, 3)).reshape((-1, x.shape[-1]))
        order = np.arange(batch * rows * columns, dtype=np.int32).reshape((batch, rows, columns)).transpose((0, 2, 1))
        return self.gather(x, Tensor(order.reshape((-1,)), ms.int32), 0)

    def construct(self, x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        return self.swap(x, batch, rows, columns)

    def bprop(self, x, batch, rows, columns, out, dout):
        return self.swap(dout, batch, columns, rows), 0, 0, 0
