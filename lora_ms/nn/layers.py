"""Normalisation, the feed-forward block and the embedding."""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from lora_ms.nn.parallel import WHOLE, Shard, enter, leave
from lora_ms.nn.projection import ProductDense, stream_dtype
from lora_ms.ops import native as cpu
from lora_ms.ops.portable import GatedSiLUKernel, RMSNormKernel


def dense(in_features: int, out_features: int, has_bias: bool, dtype: ms.Type) -> nn.Dense:
    """A ``nn.Dense`` whose weights are to be loaded, hence zero until then."""
    kind = ProductDense if cpu.there() or stream_dtype(dtype) != dtype else nn.Dense
    return kind(in_features, out_features, "zeros", "zeros", has_bias, dtype=dtype)


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


class SplitEmbedding(Embedding):
    """``Embedding`` of which each rank of ``shard`` has v / n rows, one rank after another; not to be trained."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: ms.Type, shard: Shard):
        self.rows = vocab_size // shard.count
        super().__init__(self.rows, hidden_size, dtype)
        self.first = shard.index * self.rows
        self.leave = leave(shard)
        self.outer = ops.MatMul()

    def construct(self, input_ids: Tensor) -> Tensor:
        row = input_ids - self.first
        own = ops.logical_and(row >= 0, row < self.rows)
        x = ops.gather(self.weight, row * own.astype(row.dtype), 0)
        spread = self.outer(own.astype(x.dtype).reshape((-1, 1)), ops.ones((1, x.shape[-1]), x.dtype))
        return self.leave(x * spread)


class MLP(nn.Cell):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, 2020) for x [t, h]; of ``shard``, this rank's channels."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: ms.Type, shard: Shard = WHOLE):
        super().__init__()
        intermediate_size //= shard.count
        self.enter, self.leave = enter(shard), leave(shard)
        self.gate_proj = dense(hidden_size, intermediate_size, False, dtype)
        self.up_proj = dense(hidden_size, intermediate_size, False, dtype)
        self.down_proj = dense(intermediate_size, hidden_size, False, dtype)
        self.gated = GatedSiLUKernel()

    def construct(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x))[0]))
