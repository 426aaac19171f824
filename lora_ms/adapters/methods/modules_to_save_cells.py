"""Whole layers trained beside an adapter: float32 copies of what stands in the model (PEFT's ``modules_to_save``)."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.layers import Embedding, Head, RMSNorm
from lora_ms.nn.projection import WeightMatMul


def copied(parameter: Parameter, name: str) -> Parameter:
    """A trainable float32 copy."""
    return Parameter(Tensor(parameter.asnumpy().astype(np.float32)), name=name)


class TrainedHead(Head):
    """A head with a weight [v, h] of its own."""

    def __init__(self, head: Head):
        super().__init__(1, 1, has_bias=False)
        self.in_channels, self.out_channels = head.in_channels, head.out_channels
        self.base_dtype = head.weight.dtype
        self.weight = copied(head.weight, "weight")

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.weight}

    def merge(self) -> Head:
        weight = Tensor(self.weight.asnumpy(), self.base_dtype)
        return Head(self.in_channels, self.out_channels, weight, has_bias=False, dtype=self.base_dtype)


class TrainedDense(nn.Dense):
    """A dense layer whose weight [out, in], bias [out] or both are its own."""

    def __init__(self, dense: nn.Dense, weight: bool = True, bias: bool = True):
        super().__init__(1, 1, has_bias=dense.has_bias, activation=dense.activation)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.base_class, self.base_dtype = type(dense), dense.weight.dtype
        self.weight = copied(dense.weight, "weight") if weight else dense.weight
        self.trains_weight, self.trains_bias = weight, bias and dense.has_bias
        self.matmul = WeightMatMul()
        if dense.has_bias:
            self.bias = copied(dense.bias, "bias") if bias else dense.bias

    def tensors(self) -> dict[str, Parameter]:
        found = {"weight": self.weight} if self.trains_weight else {}
        return {**found, "bias": self.bias} if self.trains_bias else found

    def merge(self) -> nn.Dense:
        weight = Tensor(self.weight.asnumpy(), self.base_dtype)
        bias = Tensor(self.bias.asnumpy(), self.base_dtype) if self.has_bias else None
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
        super().__init__(norm.weight.size, norm.kernel.eps, ms.float32)
        self.base_dtype = norm.weight.dtype
        self.weight = copied(norm.weight, "weight")

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.weight}

    def merge(self) -> RMSNorm:
        norm = RMSNorm(self.weight.size, self.kernel.eps, self.base_dtype)
        norm.weight.set_data(Tensor(self.weight.asnumpy(), self.base_dtype))
        return norm
