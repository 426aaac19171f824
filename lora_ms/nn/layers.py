"""Normalisation, the feed-forward block and the embedding."""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from lora_ms.nn.kernels import GatedSiLUKernel, RMSNormKernel


def dense(in_features: int, out_features: int, has_bias: bool, dtype: ms.Type) -> nn.Dense:
    """A ``nn.Dense`` whose weights are to be loaded, hence zero until then."""
    return nn.Dense(in_features, out_features, "zeros", "zeros", has_bias, dtype=dtype)


class Head(nn.Dense):
    """The projection to the vocabulary, whose weight the loss and the logits ask for and multiply themselves."""

    def whole_weight(self) -> Tensor:
        return self.weight


class RMSNorm(nn.Cell):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019) of x [t, h]."""

    def __init__(self, hidden_size: int, eps: float, dtype: ms.Type):
        super().__init__()
        self.weight = Parameter(initializer("ones", (hidden_size,), dtype), name="weight")
        self.kernel = RMSNormKernel(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight)


class Embedding(nn.Cell):
    """Rows of ``weight`` [v, h] by id."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: ms.Type):
        super().__init__()
        self.weight = Parameter(initializer("zeros", (vocab_size, hidden_size), dtype), name="weight")

    def construct(self, input_ids: Tensor) -> Tensor:
        return ops.gather(self.weight, input_ids, 0)


class MLP(nn.Cell):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, 2020) for x [t, h]."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: ms.Type):
        super().__init__()
        self.gate_proj = dense(hidden_size, intermediate_size, False, dtype)
        self.up_proj = dense(hidden_size, intermediate_size, False, dtype)
        self.down_proj = dense(intermediate_size, hidden_size, False, dtype)
        self.gated = GatedSiLUKernel()

    def construct(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x))[0])
