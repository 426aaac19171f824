"""What methods share whose update of a weight is a product of two matrices, of which something else trains."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Pair
from lora_ms.adapters.methods.base_cells import AdapterCell, dense_of, freeze
from lora_ms.nn.dropout import DropoutKernel
from lora_ms.nn.projection import Projection, projection_of
from lora_ms.ops import PORTABLE, Operators


class PairDense(AdapterCell):
    """``y = x W^T + b + updated(dropout(x))`` with W and b frozen, where ``updated(x)`` is ``x A^T B^T``.

    A subclass says what A [rank, in] and B [out, rank] are made of: in the graph (``updated``, ``factors``) and on the
    host (``factor_values``).

    Args:
        layer: a projection, a ``nn.Dense`` or a cell like it.
        dropout: probability, in [0, 1), with which an input of the update is zeroed in training.
        operators: what it computes with; a projection has its own.
    """

    base: Projection

    def __init__(self, layer: nn.Cell, dropout: float, operators: Operators = PORTABLE):
        super().__init__()
        self.base = projection_of(layer, operators)
        self.was_dense = not isinstance(layer, Projection)
        freeze(self.base)
        self.dropout = DropoutKernel(dropout, self.base.in_channels)

    def updated(self, x: Tensor) -> Tensor:
        """x [t, in] -> x A^T B^T [t, out]."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] in the graph."""
        raise NotImplementedError

    def factor_values(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """``factors`` on the host."""
        raise NotImplementedError

    def pair(self) -> Pair | None:
        return Pair(*self.factor_values(), 1.0)

    @property
    def joins_batches(self) -> bool:
        return True

    def merge(self) -> nn.Cell:
        a, b = self.factor_values()
        bias = self.base.bias.asnumpy() if self.base.has_bias else None
        merged = self.base.replaced(self.base.numbers() + b @ a, bias)
        return dense_of(merged) if self.was_dense else merged

    def whole_weight(self) -> Tensor:
        """``W + B A`` [out, in] float32 in the graph: for the head, whose product the loss forms in chunks."""
        a, b = self.factors()
        return self.base.whole_weight().astype(ms.float32) + ops.matmul(b, a)

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape((-1, shape[-1]))  # [t, in]
        y = self.base.multiply(x) + self.updated(self.dropout(x))
        return self.base.finish(y).reshape(shape[:-1] + (-1,))
