"""Whole layers trained beside an adapter: float32 copies of what stands in the model (PEFT's ``modules_to_save``)."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.layers import Embedding, Head, RMSNorm
from lora_ms.nn.projection import DenseProjection, Projection
from lora_ms.ops import PORTABLE, Operators


def copied(parameter: Parameter, name: str) -> Parameter:
    """A trainable float32 copy."""
    return Parameter(Tensor(parameter.asnumpy().astype(np.float32)), name=name)


class TrainedHead(Head):
    """A head with a weight [v, h] of its own."""

    def __init__(self, head: Head):
        super().__init__(copied(head.weight, "weight"), None, head.operators)
        self.base_dtype = head.weight.dtype

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.weight}

    def merge(self) -> Head:
        return Head(Parameter(Tensor(self.weight.asnumpy(), self.base_dtype), name="weight"), None, self.operators)


class TrainedDense(nn.Dense):
    """A dense layer whose weight [out, in], bias [out] or both are its own."""

    def __init__(self, dense: Any, weight: bool = True, bias: bool = True, operators: Operators = PORTABLE):
        self.operators = dense.operators if isinstance(dense, Projection) else operators
        super().__init__(1, 1, has_bias=dense.has_bias, activation=dense.activation)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.base_class: Any = type(dense)
        self.base_dtype = dense.weight.dtype
        self.weight = copied(dense.weight, "weight") if weight else dense.weight
        self.trains_weight, self.trains_bias = weight, bias and dense.has_bias
        self.matmul = self.operators.product()
        if dense.has_bias:
            self.bias = copied(dense.bias, "bias") if bias else dense.bias

    def tensors(self) -> dict[str, Parameter]:
        found = {"weight": self.weight} if self.trains_weight else {}
        return {**found, "bias": self.bias} if self.trains_bias else found

    def merge(self) -> nn.Cell:
        weight = Tensor(self.weight.asnumpy(), self.base_dtype)
        bias = Tensor(self.bias.asnumpy(), self.base_dtype) if self.has_bias else None
        if issubclass(self.base_class, DenseProjection):
            new_bias = None if bias is None else Parameter(bias, name="bias")
            return self.base_class(Parameter(weight, name="weight"), new_bias, self.operators, self.activation)
        shape = (self.in_channels, self.out_channels)
        return self.base_class(*shape, weight, bias, self.has_bias, self.activation, self.base_dtype)

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(x.reshape((-1, x.shape[-1])), self.weight.astype(x.dtype))
        if self.has_bias:
            y = self.bias_add(y, self.bias.astype(x.dtype))
        if self.activation_flag:
            y = self.activation(y)
        return y.reshape(x.shape[:-1] + (-1,))


class TrainedEmbedding(Embedding):
    """An embedding with rows [v, h] of its own."""

    def __init__(self, embedding: Embedding):
        super().__init__(1, 1, embedding.weight.dtype)
        self.base_dtype: ms.Type = embedding.weight.dtype
        self.weight = copied(embedding.weight, "weight")

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.weight}

    def merge(self) -> Embedding:
        embedding = Embedding(self.weight.shape[0], self.weight.shape[1], self.base_dtype)
        embedding.weight.set_data(Tensor(self.weight.asnumpy(), self.base_dtype))
        return embedding

    def construct(self, input_ids: Tensor) -> Tensor:
        return ops.gather(self.weight, input_ids, 0).astype(self.base_dtype)


class TrainedNorm(RMSNorm):
    """A norm with a weight [h] of its own."""

    def __init__(self, norm: RMSNorm):
        super().__init__(norm.weight.size, norm.eps, ms.float32, norm.operators)
        self.base_dtype = norm.weight.dtype
        self.weight = copied(norm.weight, "weight")

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.weight}

    def merge(self) -> RMSNorm:
        norm = RMSNorm(self.weight.size, self.eps, self.base_dtype, self.operators)
        norm.weight.set_data(Tensor(self.weight.asnumpy(), self.base_dtype))
        return norm
