"""A projection whose weight has four bits a number, in groups: GPTQ's and AWQ's (see ``lora_ms.quant.int4``)."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.linear import Operands
from lora_ms.nn.quantised import QuantisedProjection, frozen
from lora_ms.ops import PORTABLE, Operators
from lora_ms.quant import int4
from lora_ms.quant.int4 import Int4


class Int4Projection(QuantisedProjection):
    """``codes`` are bytes of two numbers, [out, in / 2]; ``scales`` (float16) and ``zeros`` (bytes) are [out, groups].

    Where the groups are not of consecutive inputs, ``order`` [in] says which input each packed column belongs to:
    inputs and A, which multiplies them, are brought into that order.
    """

    def __init__(
        self,
        weight: Int4,
        bias: Parameter | None,
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
    ):
        super().__init__(weight.shape, operators, activation)
        self.codes = frozen(weight.packed, "codes")
        self.scales = frozen(weight.scales, "scales")
        self.zeros = frozen(weight.zeros, "zeros")
        self.reorders = weight.order is not None
        if weight.order is not None:
            self.order = frozen(weight.order, "order")
            self.inverse = frozen(np.argsort(weight.order).astype(np.int32), "inverse")
            self.reorder = operators.column_order()
        self.set_bias(bias)
        self.product = operators.int4_product()
        self.product_back = operators.int4_product_back()
        self.product_of_rows = PORTABLE.int4_product()

    def operands(self) -> Operands | None:
        return None if self.reorders else self.operands_of(*self.weights())

    def weights(self) -> list[Parameter]:
        found = [self.codes, self.scales, self.zeros]
        return [*found, self.order, self.inverse] if self.reorders else found

    def ordered(self, x: Tensor) -> Tensor:
        """x [t, in] in the order of the packed columns."""
        return self.reorder(x, self.order, self.inverse) if self.reorders else x

    def multiply(self, x: Tensor) -> Tensor:
        return self.product(self.ordered(x), self.codes, self.scales, self.zeros)

    def multiply_back(self, grad: Tensor) -> Tensor:
        found = self.product_back(grad, self.codes, self.scales, self.zeros)
        return self.reorder(found, self.inverse, self.order) if self.reorders else found

    def multiply_rows(self, rows: Tensor) -> Tensor:
        return self.product_of_rows(self.ordered(rows), self.codes, self.scales, self.zeros)

    def adapted_product(self, dropout: float) -> nn.Cell:
        return self.operators.int4_adapted_product(dropout)

    def multiply_adapted(
        self,
        product: nn.Cell,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        draws: tuple = (None, None),
    ) -> Tensor:
        rows, columns = draws[0], draws[1]
        if columns is not None:
            columns = self.ordered(columns)
        weight = (self.codes, self.scales, self.zeros)
        return product(self.ordered(x), *weight, a=self.ordered(a), b=b, scaling=scaling, rows=rows, columns=columns)

    def stored(self) -> Int4:
        """The weight as it is kept, on the host."""
        order = self.order.asnumpy() if self.reorders else None
        return Int4(self.codes.asnumpy(), self.scales.asnumpy(), self.zeros.asnumpy(), order)

    def numbers(self) -> NDArray[np.float32]:
        return int4.dequantise(self.stored())

    def with_bias(self, bias: Parameter) -> "Int4Projection":
        return Int4Projection(self.stored(), bias, self.operators, self.activation)
