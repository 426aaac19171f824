"""One batch with another adapter in each row: the adapters of a layer side by side, and a gate that picks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.projection import Projection
from lora_ms.ops import PORTABLE


class Factors(NamedTuple):
    """One adapter of one layer: A [rank, in], B [out, rank] and the number that scales their product."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float


class MixedLoRADense(nn.Dense):
    """``y = x W^T + b + (gate * x A^T) B^T`` with A and B of several adapters stacked along the rank.

    Args:
        dense: the layer under the adapters; its weight and bias are shared.
        factors: those of the adapters that stand on this layer, by their place in ``choice``.
        choice: [b, n] of 0 and 1, shared by all layers: which of the n adapters each row of the batch uses; a row of
            zeros uses none.
    """

    def __init__(self, dense: nn.Dense | Projection, factors: dict[int, Factors], choice: Parameter):
        super().__init__(1, 1, has_bias=dense.has_bias)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.weight = dense.weight
        if dense.has_bias:
            self.bias = dense.bias
        self.choice, self.ranks = choice, sum(len(f.a) for f in factors.values())
        shapes = {
            "lora_a": (self.ranks, self.in_channels),
            "lora_b": (self.out_channels, self.ranks),
            "spread": (choice.shape[1], self.ranks),  # [n, ranks]: scaling, at an adapter's own ranks
        }
        self.lora_a, self.lora_b, self.spread = (
            Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)
            for name, shape in shapes.items()
        )
        self.fill(factors)
        self.product = ops.MatMul()
        self.product_t = ops.MatMul(transpose_b=True)
        self.weight_product = (dense.operators if isinstance(dense, Projection) else PORTABLE).product()

    def fill(self, factors: dict[int, Factors]) -> None:
        """Takes over the numbers of adapters of the ranks that the cell was made for."""
        spread, start = np.zeros(self.spread.shape, np.float32), 0
        for index, one in factors.items():
            spread[index, start : start + len(one.a)] = one.scaling
            start += len(one.a)
        self.lora_a.set_data(Tensor(np.concatenate([f.a for f in factors.values()])))
        self.lora_b.set_data(Tensor(np.concatenate([f.b for f in factors.values()], 1)))
        self.spread.set_data(Tensor(spread))

    def construct(self, x: Tensor) -> Tensor:
        """x [t, in] -> [t, out], t = b * s."""
        rows, ranks = self.choice.shape[0], self.ranks
        gate = self.product(self.choice, self.spread).astype(x.dtype).reshape((rows, 1, ranks))
        gate = ops.tile(gate, (1, x.shape[0] // rows, 1)).reshape((-1, ranks))  # [t, ranks]
        low = self.product_t(x, self.lora_a.astype(x.dtype)) * gate
        y = self.weight_product(x, self.weight) + self.product_t(low, self.lora_b.astype(x.dtype))
        return self.bias_add(y, self.bias) if self.has_bias else y


def choice_values(rows: Sequence[int | None], adapters: int) -> NDArray[np.float32]:
    """``MixedLoRADense``'s choice [b, n], from the place of each row's adapter, or None."""
    values = np.zeros((len(rows), adapters), np.float32)
    for row, index in enumerate(rows):
        if index is not None:
            values[row, index] = 1.0
    return values
