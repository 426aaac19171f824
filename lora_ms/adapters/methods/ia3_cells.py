"""IA3 on a dense layer or the head."""

from typing import TYPE_CHECKING

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell, dense_of, freeze
from lora_ms.adapters.methods.ia3 import IA3Spec
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding
from lora_ms.nn.projection import Projection, projection_of
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.ia3 import IA3Config


class IA3Dense(AdapterCell):
    """``y = l * (x W^T + b)``, or with ``feedforward`` ``y = (l * x) W^T + b``; W and b are frozen.

    ``ia3_l`` is [out, 1] or [1, in], as in PEFT's file, and float32 whatever the weight's type.

    Args:
        layer: a projection, a ``nn.Dense`` or a cell like it.
        feedforward: whether the input is scaled, in place of the output.
        ia3_l_init: an initializer; ones by default, so that a fresh adapter changes nothing.
        operators: what it computes with; a projection has its own.
    """

    TITLE = "IA3"
    base: Projection

    def __init__(self, layer: nn.Cell, feedforward: bool = False, ia3_l_init="ones", operators: Operators = PORTABLE):
        super().__init__()
        self.base = projection_of(layer, operators)
        self.was_dense = not isinstance(layer, Projection)
        freeze(self.base)
        self.feedforward = feedforward
        shape = (1, self.base.in_channels) if feedforward else (self.base.out_channels, 1)
        self.ia3_l = Parameter(initializer(ia3_l_init, shape, ms.float32), name="ia3_l")
        self.column_scale = self.base.operators.column_scale()

    @property
    def spec(self) -> IA3Spec:
        return IA3Spec(self.feedforward)

    def tensors(self) -> dict[str, Parameter]:
        return {"ia3_l": self.ia3_l}

    def merge(self) -> nn.Cell:
        scale = self.ia3_l.asnumpy()
        bias = self.base.bias.asnumpy() if self.base.has_bias else None
        if bias is not None and not self.feedforward:
            bias = bias * scale[:, 0]
        merged = self.base.replaced(self.base.numbers() * scale, bias)
        return dense_of(merged) if self.was_dense else merged

    def whole_weight(self) -> Tensor:
        """The scaled weight [out, in] float32 in the graph: for the head, whose product the loss forms in chunks."""
        weight = self.base.whole_weight().astype(ms.float32)
        scale = self.ia3_l
        # the outer product with ones spreads the vector over the matrix without a broadcast, which keeps indices
        if self.feedforward:
            return weight * ops.matmul(ops.ones((weight.shape[0], 1), weight.dtype), scale)
        return weight * ops.matmul(scale, ops.ones((1, weight.shape[1]), weight.dtype))

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        scale = self.ia3_l.astype(x.dtype).reshape((-1,))
        x = x.reshape((-1, shape[-1]))  # [t, in]
        if self.feedforward:
            y = self.base(self.column_scale(x, scale))
        else:
            y = self.column_scale(self.base(x), scale)
        return y.reshape(shape[:-1] + (-1,))


def build(config: "IA3Config", target: Target, spec: IA3Spec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    if type(target.layer) is Embedding:
        raise LoraMsError("IA3 adapts dense layers and the head, not the embedding: leave it out of target_modules")
    init = "ones" if config.init_ia3_weights else Normal(1.0)
    return IA3Dense(target.layer, spec.feedforward, init, target.operators)
