"""Weights that multiply: ``y = x W^T + b``. What type the weight has, only its ``Projection`` knows."""

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from numpy.typing import NDArray

from lora_ms.nn.linear import LinearLayer, Operands
from lora_ms.ops import Operators


def vector_dtype(dtype: ms.Type, operators: Operators) -> ms.Type:
    """The type of biases and norms' weights where matrices have ``dtype``: few numbers, in a type with arithmetic."""
    return operators.stream_dtype(dtype) if dtype == ms.bfloat16 else dtype


_shared_zeros: dict[ms.Type, NDArray] = {}  # of each type, one-dimensional


def unfilled(shape: tuple[int, int], dtype: ms.Type) -> Parameter:
    """A weight that ``set_data`` is to fill before anybody reads or writes it: all such share the memory of zeros.

    With zeros of its own, each of a model's matrices would take a page of 2 MB where the system hands out such pages:
    0.1 to 0.8 s for 200 of them.
    """
    size = math.prod(shape)
    if size > _shared_zeros.get(dtype, np.empty(0)).size:
        _shared_zeros[dtype] = np.zeros(size, ms.dtype_to_nptype(dtype))
    parameter = Parameter(Tensor(np.zeros(1), dtype), name="weight")
    parameter.assign_value(Tensor.from_numpy(_shared_zeros[dtype][:size].reshape(shape)))
    return parameter


class Projection(nn.Cell, LinearLayer):
    """A linear layer, ``activation(x W^T + b)`` for x [..., in] -> [..., out].

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        operators: what it computes with.
        activation: applied to the output; None for none.
    """

    quantised = False  # whether the weight has fewer bits than ``numbers``, and does not train

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.operators = operators
        self.bias_add = ops.BiasAdd()
        self.has_activation = activation is not None
        self.activation: Any = activation
        self.set_bias(None)

    def set_bias(self, bias: Parameter | None) -> None:
        """Sets the bias [out]; None for none. Constructors call it again after they set the weight, as ``nn.Dense``
        orders the two: optimisers and checkpoints of all parameters go by this order."""
        self.bias: Any = bias
        self.has_bias = bias is not None

    def operands_of(self, *weight: Parameter) -> Operands | None:
        """``operands`` of a weight of these parameters."""
        if self.has_activation:
            return None
        return Operands((*weight, self.bias) if self.has_bias else weight, self.has_bias)

    @property
    def weight_dtype(self) -> ms.Type:
        """The type in which ``replaced`` keeps a dense weight or bias."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """x [t, in] -> x W^T [t, out], in the type of x."""
        raise NotImplementedError

    def multiply_back(self, grad: Tensor) -> Tensor:
        """dy [t, out] -> dy W [t, in], in the type of dy: the backward of ``multiply``, not differentiable itself."""
        raise NotImplementedError

    def adapted_product(self, dropout: float) -> nn.Cell:
        """What ``multiply_adapted`` takes as ``product``; an adapter makes one for itself, with its own dropout."""
        raise NotImplementedError

    def multiply_adapted(
        self,
        product: nn.Cell,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        draws: tuple = (None, None),
    ) -> Tensor:
        """x [t, in] -> x W^T + scaling dropout(x) A^T B^T [t, out], A [rank, in], B [out, rank], scaling [].

        draws: the random numbers of the dropout, rows [t, 1] and columns [1, in]; (None, None) for none.
        """
        raise NotImplementedError

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """A few rows [n, in] float32 -> [n, out] float32, by the portable product whatever ``operators`` are."""
        raise NotImplementedError

    def numbers(self) -> NDArray[np.float32]:
        """The weight [out, in], on the host."""
        raise NotImplementedError

    def original(self) -> NDArray[np.float32] | None:
        """Of a quantised weight, the one that was quantised; None where it is not at hand."""
        return self.numbers()

    @property
    def weight_size(self) -> int:
        """Numbers of the weight."""
        return self.in_channels * self.out_channels

    def replaced(self, weight: NDArray, bias: NDArray | None = None, dtype: ms.Type | None = None) -> "Projection":
        """A projection like this one, with the weight [out, in] and the bias [out] given, in ``weight_dtype`` or
        ``dtype``."""
        raise NotImplementedError

    def with_weight(self, weight: NDArray) -> "Projection":
        """A projection like this one with the weight [out, in] given, which shares the bias."""
        raise NotImplementedError

    def with_bias(self, bias: Parameter) -> "Projection":
        """A projection like this one with the bias [out] given, which shares the weight."""
        raise NotImplementedError

    def trainable(self) -> "DenseProjection":
        """A projection with a float32 copy of the weight, which trains, and this bias."""
        raise NotImplementedError

    def add_bias(self, y: Tensor) -> Tensor:
        """y [t, out] -> y + b."""
        return self.bias_add(y, self.bias.astype(y.dtype)) if self.has_bias else y

    def finish(self, y: Tensor) -> Tensor:
        """y = x W^T [t, out] -> what the layer gives, with bias and activation."""
        y = self.add_bias(y)
        return self.activation(y) if self.has_activation else y

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) == 2:
            return self.finish(self.multiply(x))
        return self.finish(self.multiply(x.reshape((-1, shape[-1])))).reshape(shape[:-1] + (-1,))


class DenseProjection(Projection):
    """A projection whose ``weight`` [out, in] is float32, float16 or bfloat16, whatever the type of x."""

    def __init__(
        self,
        weight: Parameter,
        bias: Parameter | None,
        operators: Operators,
        activation: nn.Cell | ops.Primitive | None = None,
    ):
        out_channels, in_channels = weight.shape
        super().__init__(in_channels, out_channels, operators, activation)
        self.weight = weight
        self.set_bias(bias)
        self.product = operators.product()
        self.product_back = operators.product_back()
        self.product_of_rows = ops.MatMul(transpose_b=True)

    @classmethod
    def zeros(
        cls, in_channels: int, out_channels: int, has_bias: bool, dtype: ms.Type, operators: Operators
    ) -> "DenseProjection":
        """A layer whose numbers are to be loaded."""
        weight = unfilled((out_channels, in_channels), dtype)
        bias_dtype = vector_dtype(dtype, operators)
        bias = Parameter(initializer("zeros", (out_channels,), bias_dtype), name="bias") if has_bias else None
        return cls(weight, bias, operators)

    @property
    def weight_dtype(self) -> ms.Type:
        return self.weight.dtype

    def operands(self) -> Operands | None:
        return self.operands_of(self.weight) if type(self) is DenseProjection else None

    def multiply(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)

    def multiply_back(self, grad: Tensor) -> Tensor:
        return self.product_back(grad, self.weight)

    def multiply_rows(self, rows: Tensor) -> Tensor:
        return self.product_of_rows(rows, self.weight.astype(ms.float32))

    def whole_weight(self) -> Tensor:
        """The weight [out, in] in the graph: for the head, whose product the loss and the logits form themselves.

        What trains is float32, so that a narrow weight has no gradient: the loss's is float32, which does not add to
        that of a tied embedding in the weight's type, though nobody asks for either.
        """
        return self.weight if self.weight.dtype == ms.float32 else ops.stop_gradient(self.weight)

    def adapted_product(self, dropout: float) -> nn.Cell:
        return self.operators.adapted_product(dropout)

    def multiply_adapted(
        self,
        product: nn.Cell,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        draws: tuple = (None, None),
    ) -> Tensor:
        return product(x, self.weight, a, b, scaling, rows=draws[0], columns=draws[1])

    def numbers(self) -> NDArray[np.float32]:
        return self.weight.asnumpy().astype(np.float32)

    def replaced(self, weight: NDArray, bias: NDArray | None = None, dtype: ms.Type | None = None) -> "DenseProjection":
        dtype = self.weight_dtype if dtype is None else dtype
        new_bias = None if bias is None else Parameter(Tensor(bias, dtype), name="bias")
        return self._like(Parameter(Tensor(weight, dtype), name="weight"), new_bias)

    def with_weight(self, weight: NDArray) -> "DenseProjection":
        return self._like(Parameter(Tensor(weight, self.weight.dtype), name=self.weight.name), self.bias)

    def with_bias(self, bias: Parameter) -> "DenseProjection":
        return self._like(self.weight, bias)

    def trainable(self) -> "DenseProjection":
        return self._like(Parameter(Tensor(self.numbers()), name=self.weight.name), self.bias)

    def _like(self, weight: Parameter, bias: Parameter | None) -> "DenseProjection":
        return type(self)(weight, bias, self.operators, self.activation)


def projection_of(cell: nn.Cell, operators: Operators) -> Projection:
    """``cell`` where it is a projection; else, of a ``nn.Dense`` or a cell like it, one that shares its parameters."""
    if isinstance(cell, Projection):
        return cell
    dense: Any = cell
    return DenseProjection(dense.weight, dense.bias if dense.has_bias else None, operators, dense.activation)
