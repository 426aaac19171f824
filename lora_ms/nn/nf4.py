"""A projection whose weight is in NF4: four bits a number (see ``lora_ms.quant.nf4``)."""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.projection import DenseProjection, Projection
from lora_ms.ops import PORTABLE, Operators
from lora_ms.quant import nf4
from lora_ms.quant.nf4 import NF4, Nested


class NF4Projection(Projection):
    """A projection whose weight is in NF4 and does not train.

    ``codes`` are bytes of two numbers, [out, in / 2] where in is even; ``absmax`` [blocks] are float32, or bytes beside
    ``nested_codes``, ``nested_absmax`` and ``offset``. They stay as they are: products decode them.

    Args:
        weight: of an even number of numbers.
        original: reads the weight [out, in] that was quantised; None where it is not at hand.
    """

    quantised = True

    def __init__(
        self,
        weight: NF4,
        bias: Parameter | None,
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
        original: Callable[[], NDArray[np.float32]] | None = None,
    ):
        out_channels, in_channels = weight.shape
        super().__init__(in_channels, out_channels, operators, activation)
        shape = (out_channels, in_channels // 2) if in_channels % 2 == 0 else (1, weight.packed.size)
        self.codes = _frozen(weight.packed.reshape(shape), "codes")
        self.absmax = _frozen(weight.absmax, "absmax")
        self.double = weight.nested is not None
        if weight.nested is not None:
            self.nested_codes = _frozen(weight.nested.codes, "nested_codes")
            self.nested_absmax = _frozen(weight.nested.absmax, "nested_absmax")
            self.offset = _frozen(np.array([weight.nested.offset], np.float32), "offset")
            self.decode_absmax = operators.nf4_absmax()
        self.set_bias(bias)
        self.product = operators.nf4_product()
        self.product_back = operators.nf4_product_back()
        self.product_of_rows = PORTABLE.nf4_product()
        self._original = original

    @property
    def weight_dtype(self) -> ms.Type:
        return ms.float32

    def plain_absmax(self) -> Tensor:
        """[blocks] float32, in the graph."""
        if not self.double:
            return self.absmax
        return self.decode_absmax(self.absmax, self.nested_codes, self.nested_absmax, self.offset)

    def multiply(self, x: Tensor) -> Tensor:
        return self.product(x, self.codes, self.plain_absmax())

    def multiply_back(self, grad: Tensor) -> Tensor:
        return self.product_back(grad, self.codes, self.plain_absmax())

    def multiply_rows(self, rows: Tensor) -> Tensor:
        return self.product_of_rows(rows, self.codes, self.plain_absmax())

    def adapted_product(self, dropout: float) -> nn.Cell:
        return self.operators.nf4_adapted_product(dropout)

    def multiply_adapted(
        self,
        product: nn.Cell,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        draws: tuple = (None, None),
    ) -> Tensor:
        absmax = self.plain_absmax()
        return product(x, self.codes, absmax, a, b, scaling, rows=draws[0], columns=draws[1])

    def weights(self) -> list[Parameter]:
        """What the weight consists of."""
        found = [self.codes, self.absmax]
        return [*found, self.nested_codes, self.nested_absmax, self.offset] if self.double else found

    def stored(self) -> NF4:
        """The weight as it is kept, on the host."""
        nested = None
        if self.double:
            offset = np.float32(self.offset.asnumpy()[0])
            nested = Nested(self.nested_absmax.asnumpy(), self.nested_codes.asnumpy(), offset)
        shape = (self.out_channels, self.in_channels)
        return NF4(shape, self.codes.asnumpy().reshape(-1), self.absmax.asnumpy(), nested)

    def numbers(self) -> NDArray[np.float32]:
        return nf4.dequantise(self.stored())

    def original(self) -> NDArray[np.float32] | None:
        return None if self._original is None else self._original()

    def replaced(self, weight: NDArray, bias: NDArray | None = None, dtype: ms.Type | None = None) -> Projection:
        dtype = self.weight_dtype if dtype is None else dtype
        new_bias = None if bias is None else Parameter(Tensor(bias, dtype), name="bias")
        return self._dense(weight, new_bias, dtype)

    def with_weight(self, weight: NDArray) -> Projection:
        return self._dense(weight, self.bias, self.weight_dtype)

    def with_bias(self, bias: Parameter) -> "NF4Projection":
        return NF4Projection(self.stored(), bias, self.operators, self.activation, self._original)

    def trainable(self) -> DenseProjection:
        return self._dense(self.numbers(), self.bias, ms.float32)

    def _dense(self, weight: NDArray, bias: Any, dtype: ms.Type) -> DenseProjection:
        return DenseProjection(Parameter(Tensor(weight, dtype), name="weight"), bias, self.operators, self.activation)


def _frozen(values: NDArray, name: str) -> Parameter:
    # from_numpy shares the memory: a weight is in memory once
    return Parameter(Tensor.from_numpy(np.ascontiguousarray(values)), name=name, requires_grad=False)
