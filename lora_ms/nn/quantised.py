"""What projections with weights of few bits have in common: these do not train, and stay as they are stored."""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.projection import DenseProjection, Projection
from lora_ms.ops import Operators


class QuantisedProjection(Projection):
    """A projection whose weight does not train; one with another weight is a ``DenseProjection``.

    A subclass sets the weight's parameters, then the bias, and defines ``weights``, ``numbers`` and ``with_bias``.

    Args:
        original: reads the weight [out, in] that was quantised; None where it is not at hand.
    """

    quantised = True

    def __init__(
        self,
        shape: tuple[int, int],
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
        original: Callable[[], NDArray[np.float32]] | None = None,
    ):
        out_channels, in_channels = shape
        super().__init__(in_channels, out_channels, operators, activation)
        self._original = original

    @property
    def weight_dtype(self) -> ms.Type:
        return ms.float32

    def weights(self) -> list[Parameter]:
        """What the weight consists of."""
        raise NotImplementedError

    def original(self) -> NDArray[np.float32] | None:
        return None if self._original is None else self._original()

    def replaced(self, weight: NDArray, bias: NDArray | None = None, dtype: ms.Type | None = None) -> Projection:
        dtype = self.weight_dtype if dtype is None else dtype
        new_bias = None if bias is None else Parameter(Tensor(bias, dtype), name="bias")
        return self._dense(weight, new_bias, dtype)

    def with_weight(self, weight: NDArray) -> Projection:
        return self._dense(weight, self.bias, self.weight_dtype)

    def trainable(self) -> DenseProjection:
        return self._dense(self.numbers(), self.bias, ms.float32)

    def _dense(self, weight: NDArray, bias: Any, dtype: ms.Type) -> DenseProjection:
        return DenseProjection(Parameter(Tensor(weight, dtype), name="weight"), bias, self.operators, self.activation)


def frozen(values: NDArray, name: str) -> Parameter:
    """A parameter that does not train and shares the memory of ``values``: a weight is in memory once."""
    return Parameter(Tensor.from_numpy(np.ascontiguousarray(values)), name=name, requires_grad=False)
