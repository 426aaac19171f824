"""VeRA on a dense layer or the head."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.adapters.methods.pair_cells import PairDense
from lora_ms.adapters.methods.ranked import RankSpec
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.vera import VeraConfig

Array = NDArray[np.float32]


class VeraDense(PairDense):
    """``y = x W^T + b + lambda_b * (lambda_d * dropout(x) A^T) B^T``; W, b, A and B are frozen.

    Args:
        layer: a projection, a ``nn.Dense`` or a cell like it.
        projections: A [rank, in or more] and B [out or more, rank], which all modules share.
        d_initial: where lambda_d starts; lambda_b starts as zeros, so that a fresh adapter changes nothing.
        save_projection: whether A and B go into the file.
        dropout, operators: as ``PairDense`` has them.
    """

    TITLE = "VeRA"

    def __init__(
        self,
        layer: nn.Cell,
        projections: tuple[Array, Array],
        d_initial: float = 0.1,
        save_projection: bool = True,
        dropout: float = 0.0,
        operators: Operators = PORTABLE,
    ):
        super().__init__(layer, dropout, operators)
        self.save_projection = save_projection
        self.lora_rank = len(projections[0])
        self.vera_lambda_b = Parameter(Tensor(np.zeros(self.base.out_channels, np.float32)), "vera_lambda_b")
        self.vera_lambda_d = Parameter(Tensor(np.full(self.lora_rank, d_initial, np.float32)), "vera_lambda_d")
        self.vera_a = Parameter(Tensor(np.zeros(1, np.float32)), "vera_a", requires_grad=False)
        self.vera_b = Parameter(Tensor(np.zeros(1, np.float32)), "vera_b", requires_grad=False)
        self.share(projections)
        self.product_a = self.base.operators.product()
        self.product_b = self.base.operators.product()
        self.scale_d = self.base.operators.column_scale()
        self.scale_b = self.base.operators.column_scale()

    def share(self, projections: tuple[Array, Array]) -> None:
        """Takes its part of the common A and B; on the CPU, modules of the largest size have them in one memory."""
        self._projections = projections  # the whole, for the file
        a, b = projections
        parts = (a[:, : self.base.in_channels], b[: self.base.out_channels])
        for parameter, part in zip((self.vera_a, self.vera_b), parts, strict=True):
            parameter.assign_value(Tensor.from_numpy(np.ascontiguousarray(part)))

    @property
    def spec(self) -> RankSpec:
        return RankSpec(self.lora_rank)

    def tensors(self) -> dict[str, Parameter]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def export(self) -> dict[str, Array]:
        saved = dict(zip(("vera_A", "vera_B"), self._projections, strict=True)) if self.save_projection else {}
        return {**super().export(), **saved}

    def accept(self, values: dict[str, Array]) -> dict[str, Array]:
        """A file's projections take the place of those that were drawn."""
        a, b = values.get("vera_A"), values.get("vera_B")
        if a is None or b is None or a.shape != self._projections[0].shape or b.shape != self._projections[1].shape:
            return values
        self.share((a, b))
        return {name: value for name, value in values.items() if name not in ("vera_A", "vera_B")}

    def shape_key(self) -> Hashable:
        # the projections are no part of a state: adapters of others have cells of their own
        return (super().shape_key(), self.dropout.probability, *map(id, self._projections))

    def updated(self, x: Tensor) -> Tensor:
        low = self.product_a(x, self.vera_a)  # [t, rank]
        y = self.product_b(self.scale_d(low, self.vera_lambda_d.astype(x.dtype)), self.vera_b)
        return self.scale_b(y, self.vera_lambda_b.astype(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        b = ops.matmul(self.vera_lambda_b.reshape((-1, 1)), ops.ones((1, self.lora_rank), ms.float32)) * self.vera_b
        d = ops.matmul(self.vera_lambda_d.reshape((-1, 1)), ops.ones((1, self.base.in_channels), ms.float32))
        return d * self.vera_a, b

    def factor_values(self) -> tuple[Array, Array]:
        d, b = self.vera_lambda_d.asnumpy(), self.vera_lambda_b.asnumpy()
        return d[:, None] * self.vera_a.asnumpy(), b[:, None] * self.vera_b.asnumpy()


def build(config: "VeraConfig", target: Target, spec: RankSpec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    if type(target.layer) is Embedding:
        raise LoraMsError("VeRA adapts dense layers and the head, not the embedding: leave it out of target_modules")
    return VeraDense(
        target.layer,
        config.projections(),
        config.d_initial,
        config.save_projection,
        config.lora_dropout,
        target.operators,
    )
