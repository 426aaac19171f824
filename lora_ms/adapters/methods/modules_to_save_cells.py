"""Whole modules that train beside an adapter: float32 copies of the model's layers."""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from lora_ms.adapters.methods.base_cells import AdapterCell, dense_of, trained_copy
from lora_ms.nn.layers import Embedding, Head, RMSNorm
from lora_ms.nn.projection import DenseProjection, Projection, projection_of
from lora_ms.ops import PORTABLE, Operators


class TrainedDense(AdapterCell):
    """A dense layer or head whose weight [out, in], bias [out] or both train.

    Args:
        layer: the layer before; it stays as it is.
        weight, bias: what trains; a bias only where there is one.
        operators: what it computes with; a projection has its own.
    """

    base: Projection

    def __init__(self, layer: nn.Cell, weight: bool = True, bias: bool = True, operators: Operators = PORTABLE):
        super().__init__()
        projection = projection_of(layer, operators)
        self.was_dense = not isinstance(layer, Projection)
        self.base_dtype = projection.weight_dtype
        self.trains_weight = weight
        self.trains_bias = bias and projection.has_bias
        if weight:
            projection = projection.trainable()
        if self.trains_bias:
            projection = projection.with_bias(trained_copy(projection.bias, "bias"))
        self.base = projection

    def tensors(self) -> dict[str, Parameter]:
        found = {"weight": self.base.weight} if self.trains_weight else {}
        return {**found, "bias": self.base.bias} if self.trains_bias else found

    def merge(self) -> nn.Cell:
        bias = self.base.bias.asnumpy() if self.base.has_bias else None
        merged = self.base.replaced(self.base.numbers(), bias, self.base_dtype)
        return dense_of(merged) if self.was_dense else merged

    def whole_weight(self) -> Tensor:
        """[v, h]: of the head, whose product the loss forms in chunks."""
        return self.base.whole_weight()

    def construct(self, x: Tensor) -> Tensor:
        return self.base(x)


class TrainedEmbedding(AdapterCell):
    """An embedding whose rows [v, h] train."""

    base: Embedding

    def __init__(self, layer: Embedding):
        super().__init__()
        self.base_dtype: ms.Type = layer.weight.dtype
        self.base = Embedding(trained_copy(layer.weight, "weight"), layer.operators)

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.base.weight}

    def merge(self) -> Embedding:
        weight = Parameter(Tensor(self.base.weight.asnumpy(), self.base_dtype), name="weight")
        return Embedding(weight, self.base.operators)

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.base(input_ids).astype(self.base_dtype)


class TrainedNorm(AdapterCell):
    """A norm whose weight [h] trains."""

    base: RMSNorm

    def __init__(self, layer: RMSNorm):
        super().__init__()
        self.base_dtype = layer.weight.dtype
        self.base = RMSNorm(layer.weight.size, layer.eps, ms.float32, layer.operators)
        self.base.weight = trained_copy(layer.weight, "weight")

    def tensors(self) -> dict[str, Parameter]:
        return {"weight": self.base.weight}

    def merge(self) -> RMSNorm:
        norm = RMSNorm(self.base.weight.size, self.base.eps, self.base_dtype, self.base.operators)
        norm.weight.set_data(Tensor(self.base.weight.asnumpy(), self.base_dtype))
        return norm

    def construct(self, x: Tensor) -> Tensor:
        return self.base(x)


# what can train as a whole, and as what
COPIES: dict[type, Any] = {
    nn.Dense: TrainedDense,
    DenseProjection: TrainedDense,
    Head: TrainedDense,
    Embedding: TrainedEmbedding,
    RMSNorm: TrainedNorm,
}
