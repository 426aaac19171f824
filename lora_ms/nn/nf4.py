"""A projection whose weight is in NF4: four bits a number (see ``lora_ms.quant.nf4``)."""

from collections.abc import Callable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.linear import Operands
from lora_ms.nn.quantised import QuantisedProjection, frozen
from lora_ms.ops import PORTABLE, Operators
from lora_ms.quant import nf4
from lora_ms.quant.nf4 import NF4, Nested


class NF4Projection(QuantisedProjection):
    """``codes`` are bytes of two numbers, [out, in / 2] where in is even; ``absmax`` [blocks] are float32, or bytes
    beside ``nested_codes``, ``nested_absmax`` and ``offset``. They stay as they are: products decode them.

    Args:
        weight: of an even number of numbers.
        original: reads the weight [out, in] that was quantised; None where it is not at hand.
    """

    def __init__(
        self,
        weight: NF4,
        bias: Parameter | None,
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
        original: Callable[[], NDArray[np.float32]] | None = None,
    ):
        out_channels, in_channels = weight.shape
        super().__init__(weight.shape, operators, activation, original)
        shape = (out_channels, in_channels // 2) if in_channels % 2 == 0 else (1, weight.packed.size)
        self.codes = frozen(weight.packed.reshape(shape), "codes")
        self.absmax = frozen(weight.absmax, "absmax")
        self.double = weight.nested is not None
        if weight.nested is not None:
            self.nested_codes = frozen(weight.nested.codes, "nested_codes")
            self.nested_absmax = frozen(weight.nested.absmax, "nested_absmax")
            self.offset = frozen(np.array([weight.nested.offset], np.float32), "offset")
            self.decode_absmax = operators.nf4_absmax()
        self.set_bias(bias)
        self.product = operators.nf4_product()
        self.product_back = operators.nf4_product_back()
        self.product_of_rows = PORTABLE.nf4_product()

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

    def operands(self) -> Operands | None:
        return self.operands_of(*self.weights())

    def weights(self) -> list[Parameter]:
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

    def with_bias(self, bias: Parameter) -> "NF4Projection":
        return NF4Projection(self.stored(), bias, self.operators, self.activation, self._original)
