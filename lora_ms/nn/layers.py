"""Normalisation, the feed-forward block, the embedding and the head."""

from collections.abc import Callable

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from lora_ms.nn.parallel import WHOLE, Shard, sum_gradient, sum_output
from lora_ms.nn.projection import DenseProjection, Projection, unfilled, vector_dtype
from lora_ms.ops import PORTABLE, Operators

# kinds of weights by the type that a model is loaded in
PROJECTIONS: dict[ms.Type, type[DenseProjection]] = {
    ms.float32: DenseProjection,
    ms.float16: DenseProjection,
    ms.bfloat16: DenseProjection,
}


def projection(in_channels: int, out_channels: int, has_bias: bool, dtype: ms.Type, operators: Operators) -> Projection:
    """A projection whose numbers are to be loaded, zero until then."""
    return PROJECTIONS[dtype].zeros(in_channels, out_channels, has_bias, dtype, operators)


MakeProjection = Callable[[str, int, int, bool], Projection]
"""(name, in, out, has_bias) -> the projection of that name, as a model that is loaded wants it."""


def dense_projections(dtype: ms.Type, operators: Operators) -> MakeProjection:
    """All of ``dtype``."""

    def make(name: str, in_channels: int, out_channels: int, has_bias: bool) -> Projection:
        return projection(in_channels, out_channels, has_bias, dtype, operators)

    return make


def inside(prefix: str, make: MakeProjection) -> MakeProjection:
    """``make`` for the projections of the module ``prefix``, named by what follows it."""

    def make_inside(name: str, in_channels: int, out_channels: int, has_bias: bool) -> Projection:
        return make(f"{prefix}.{name}", in_channels, out_channels, has_bias)

    return make_inside


class Head(DenseProjection):
    """The projection to the vocabulary: the loss and the logits ask for ``whole_weight`` and multiply it themselves."""


class RMSNorm(nn.Cell):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019) of x [t, h]."""

    def __init__(self, hidden_size: int, eps: float, dtype: ms.Type, operators: Operators = PORTABLE):
        super().__init__()
        self.eps = eps
        self.operators = operators
        self.weight = Parameter(initializer("ones", (hidden_size,), vector_dtype(dtype, operators)), name="weight")
        self.kernel = operators.rms_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight)


class Embedding(nn.Cell):
    """Rows of ``weight`` [v, h] by id."""

    def __init__(self, weight: Parameter, operators: Operators = PORTABLE):
        super().__init__()
        self.virtual_tokens = 0  # ids from the vocabulary's size on that have trained vectors (prompt tuning)
        self.unrotated = 0  # of these, those whose keys are not rotated (prefix tuning)
        self.weight = weight
        self.operators = operators
        self.rows_of = operators.embedding()

    @classmethod
    def zeros(cls, vocab_size: int, hidden_size: int, dtype: ms.Type, operators: Operators = PORTABLE) -> "Embedding":
        """An embedding whose numbers are to be loaded."""
        return cls(unfilled((vocab_size, hidden_size), dtype), operators)

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.rows_of(input_ids, self.weight)


class SplitEmbedding(Embedding):
    """``Embedding`` of which each rank of ``shard`` has v / n rows, one rank after another; not to be trained."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: ms.Type, operators: Operators, shard: Shard):
        self.rows = vocab_size // shard.count
        super().__init__(Parameter(initializer("zeros", (self.rows, hidden_size), dtype), name="weight"), operators)
        self.first = shard.index * self.rows
        self.sum_output = sum_output(shard)
        self.outer = ops.MatMul()

    def construct(self, input_ids: Tensor) -> Tensor:
        row = input_ids - self.first
        here = ops.logical_and(row >= 0, row < self.rows)
        x = self.rows_of(row * here.astype(row.dtype), self.weight)
        spread = self.outer(here.astype(x.dtype).reshape((-1, 1)), ops.ones((1, x.shape[-1]), x.dtype))
        return self.sum_output(x * spread)


class MLP(nn.Cell):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, 2020) for x [t, h]; of ``shard``, this rank's channels."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        make: MakeProjection,
        operators: Operators,
        shard: Shard = WHOLE,
    ):
        super().__init__()
        channels = intermediate_size // shard.count
        self.sum_gradient = sum_gradient(shard)
        self.sum_output = sum_output(shard)
        self.gate_proj = make("gate_proj", hidden_size, channels, False)
        self.up_proj = make("up_proj", hidden_size, channels, False)
        self.down_proj = make("down_proj", channels, hidden_size, False)
        self.gated_silu = operators.gated_silu()

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [t, h] -> gate(x) and up(x) [t, channels]."""
        x = self.sum_gradient(x)
        return self.gate_proj(x), self.up_proj(x)

    def contract(self, gate: Tensor, up: Tensor) -> Tensor:
        """What ``expand`` gives -> [t, h]."""
        return self.sum_output(self.down_proj(self.gated_silu(gate, up)))

    def construct(self, x: Tensor) -> Tensor:
        gate, up = self.expand(x)
        return self.contract(gate, up)
