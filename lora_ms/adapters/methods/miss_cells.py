"""MiSS on a dense layer or the head."""

import math
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell, dense_of, freeze
from lora_ms.adapters.methods.miss import TENSOR, bat_update, spread
from lora_ms.adapters.methods.pair_cells import PairDense
from lora_ms.adapters.methods.ranked import RankSpec
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding
from lora_ms.nn.projection import DenseProjection, projection_of
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.miss import MissConfig

Array = NDArray[np.float32]


class MissDense(PairDense):
    """``y = x W^T + b + s(dropout(x)) D``; W and b are frozen.

    ``miss_block`` D is [rank, out], or [rank, mini_r] and repeated along the outputs.

    Args:
        layer: a projection, a ``nn.Dense`` or a cell like it.
        shape: of D.
        zeros: whether D starts as zeros, so that a fresh adapter changes nothing; else Kaiming uniform.
        dropout, operators: as ``PairDense`` has them.
    """

    TITLE = "MiSS"

    def __init__(
        self,
        layer: nn.Cell,
        shape: tuple[int, ...],
        zeros: bool = True,
        dropout: float = 0.0,
        operators: Operators = PORTABLE,
    ):
        super().__init__(layer, dropout, operators)
        init = "zeros" if zeros else HeUniform(negative_slope=math.sqrt(5))
        self.miss_block = Parameter(initializer(init, shape, ms.float32), TENSOR)
        self.lora_rank = shape[0]
        self.copies = self.base.out_channels // shape[1]
        self.groups = -(-self.base.in_channels // self.lora_rank)
        self.missing = self.groups * self.lora_rank - self.base.in_channels  # columns of the last group
        self.matmul = ops.MatMul()

    @property
    def spec(self) -> RankSpec:
        return RankSpec(self.lora_rank)

    def tensors(self) -> dict[str, Parameter]:
        return {TENSOR: self.miss_block}

    def block(self, dtype: ms.Type) -> Tensor:
        """D [rank, out]."""
        block = self.miss_block.astype(dtype)
        return ops.tile(block, (1, self.copies)) if self.copies > 1 else block

    def updated(self, x: Tensor) -> Tensor:
        if self.missing:
            x = ops.concat((x, ops.zeros((x.shape[0], self.missing), x.dtype)), 1)
        sums = x.reshape((-1, self.groups, self.lora_rank)).sum(1)  # [t, rank]
        return self.matmul(sums, self.block(x.dtype))

    def _sums(self) -> Array:
        """s as a matrix [rank, in]."""
        return np.tile(np.eye(self.lora_rank, dtype=np.float32), self.groups)[:, : self.base.in_channels].copy()

    def factors(self) -> tuple[Tensor, Tensor]:
        return Tensor(self._sums()), self.block(ms.float32).transpose((1, 0))

    def factor_values(self) -> tuple[Array, Array]:
        block = self.miss_block.asnumpy()
        return self._sums(), np.ascontiguousarray(spread(block, self.base.out_channels, len(block)))


class BatDense(AdapterCell):
    """``y = x W'^T + b`` with ``W' = W + W_ij D_i + D_i`` by blocks [rank, rank]; W and b are frozen.

    ``miss_block`` D is [out / rank, rank, rank]. Args as in ``MissDense``.
    """

    TITLE = "MiSS (bat)"
    base: DenseProjection

    def __init__(self, layer: nn.Cell, shape: tuple[int, ...], operators: Operators = PORTABLE):
        super().__init__()
        projection = projection_of(layer, operators)
        assert isinstance(projection, DenseProjection)
        self.base = projection
        self.was_dense = layer is not projection
        freeze(self.base)
        self.miss_block = Parameter(Tensor(np.zeros(shape, np.float32)), TENSOR)
        self.multiply = ops.BatchMatMul()
        self.product = self.base.operators.product()

    @property
    def spec(self) -> RankSpec:
        return RankSpec(self.miss_block.shape[-1])

    def tensors(self) -> dict[str, Parameter]:
        return {TENSOR: self.miss_block}

    def merge(self) -> nn.Cell:
        weight = self.base.numbers()
        bias = self.base.bias.asnumpy() if self.base.has_bias else None
        merged = self.base.replaced(weight + bat_update(weight, self.miss_block.asnumpy()), bias)
        return dense_of(merged) if self.was_dense else merged

    def whole_weight(self) -> Tensor:
        """The changed weight [out, in]: a block row of it is ``W_i + [W_ij D_i …] + [D_i …]``."""
        groups, rank, _ = self.miss_block.shape
        weight = self.base.weight.astype(ms.float32)
        count = self.base.in_channels // rank
        parts = weight.reshape((groups, rank * count, rank))  # [groups, (row, j), rank]
        added = self.multiply(parts, self.miss_block).reshape(weight.shape)
        own = ops.tile(self.miss_block.reshape((groups * rank, rank)), (1, count))
        return (weight + added + own).astype(self.base.weight.dtype)

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        y = self.product(x.reshape((-1, shape[-1])), self.whole_weight())
        return self.base.finish(y).reshape(shape[:-1] + (-1,))


def build(config: "MissConfig", target: Target, spec: RankSpec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    if type(target.layer) is Embedding:
        raise LoraMsError("MiSS adapts dense layers and the head, not the embedding: leave it out of target_modules")
    base = projection_of(target.layer, target.operators)
    weight = (base.out_channels, base.in_channels)
    fault = config.misfit(weight)
    if config.init_weights == "bat" and base.quantised:
        fault = "bat multiplies the weight, and it is quantised: choose init_weights True or mini"
    if fault:
        raise LoraMsError(f"MiSS on {target.name}: {fault}")
    shape = config.block_shape(weight)
    if config.init_weights == "bat":
        return BatDense(target.layer, shape, target.operators)
    return MissDense(target.layer, shape, config.init_weights is not False, config.lora_dropout, target.operators)
