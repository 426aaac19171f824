"""One batch with another adapter in each row: the adapters of a layer side by side, and a gate that picks."""

from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Pair
from lora_ms.nn.projection import projection_of
from lora_ms.ops import PORTABLE


class MultiAdapterDense(nn.Cell):
    """``y = x W^T + b + (gate * x A^T) B^T`` with A and B of several adapters stacked along the rank.

    Args:
        layer: the layer under the adapters.
        pairs: those of the adapters that stand on this layer, by their index in ``choice``.
        choice: [b, n] of 0 and 1, shared by all layers: which of the n adapters each row of the batch uses; a row of
            zeros uses none.
    """

    def __init__(self, layer: nn.Cell, pairs: Mapping[int, Pair], choice: Parameter):
        super().__init__(auto_prefix=False)
        self.base = projection_of(layer, PORTABLE)
        self.choice = choice
        self.ranks = sum(len(pair.a) for pair in pairs.values())
        shapes = {
            "lora_a": (self.ranks, self.base.in_channels),
            "lora_b": (self.base.out_channels, self.ranks),
            "spread": (choice.shape[1], self.ranks),  # [n, ranks]: scaling, at an adapter's own ranks
        }
        self.lora_a, self.lora_b, self.spread = (
            Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)
            for name, shape in shapes.items()
        )
        self.fill(pairs)
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)

    def fill(self, pairs: Mapping[int, Pair]) -> None:
        """Takes the numbers of adapters of the ranks that the cell was made for."""
        spread = np.zeros(self.spread.shape, np.float32)
        start = 0
        for index, pair in pairs.items():
            spread[index, start : start + len(pair.a)] = pair.scaling
            start += len(pair.a)
        self.lora_a.set_data(Tensor(np.concatenate([pair.a for pair in pairs.values()])))
        self.lora_b.set_data(Tensor(np.concatenate([pair.b for pair in pairs.values()], 1)))
        self.spread.set_data(Tensor(spread))

    def construct(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out], t = b * s."""
        rows, ranks = self.choice.shape[0], self.ranks
        gate = self.product(self.choice, self.spread).astype(x.dtype).reshape((rows, 1, ranks))
        gate = ops.tile(gate, (1, x.shape[0] // rows, 1)).reshape((-1, ranks))  # [t, ranks]
        low = self.product_t(x, self.lora_a.astype(x.dtype)) * gate
        return self.base.finish(self.base.multiply(x) + self.product_t(low, self.lora_b.astype(x.dtype)))


def choice_values(rows: Sequence[int | None], adapters: int) -> NDArray[np.float32]:
    """``MultiAdapterDense``'s choice [b, n], from the index of each row's adapter, or None."""
    values = np.zeros((len(rows), adapters), np.float32)
    for row, index in enumerate(rows):
        if index is not None:
            values[row, index] = 1.0
    return values
