"""Bottleneck adapters behind a dense layer."""

from typing import TYPE_CHECKING

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell, freeze
from lora_ms.adapters.methods.bottleneck import NOT_MERGED, TENSORS, BottleneckSpec
from lora_ms.errors import LoraMsError
from lora_ms.nn.layers import Embedding, Head
from lora_ms.nn.projection import Projection, projection_of
from lora_ms.ops import PORTABLE, Operators

if TYPE_CHECKING:
    from lora_ms.adapters.methods.bottleneck import BottleneckConfig

START = 0.02  # deviation of D
FUNCTIONS = {"relu": ops.relu, "gelu": ops.gelu, "silu": ops.silu, "tanh": ops.tanh}


class BottleneckDense(AdapterCell):
    """``y = h + scaling (act(z D^T + d) U^T + u)`` with h = x W^T + b, and z = x if ``parallel``, else h; W and b are
    frozen.

    Args:
        layer: a projection, a ``nn.Dense`` or a cell like it.
        spec: its size.
        activation: one of ``FUNCTIONS``.
        scaling: of what is added.
        parallel: whether it reads the layer's input, or its output.
        operators: what it computes with; a projection has its own.
    """

    TITLE = "bottleneck adapters"
    base: Projection

    def __init__(
        self,
        layer: nn.Cell,
        spec: BottleneckSpec,
        activation: str = "relu",
        scaling: float = 1.0,
        operators: Operators = PORTABLE,
        parallel: bool = False,
    ):
        super().__init__()
        self.base = projection_of(layer, operators)
        freeze(self.base)
        self._spec = spec
        outputs = self.base.out_channels
        size = spec.size(outputs)
        self.parallel = parallel
        width = self.base.in_channels if parallel else outputs
        self.down_weight = Parameter(initializer(Normal(START), (size, width), ms.float32), "down_weight")
        self.down_bias = Parameter(initializer("zeros", (size,), ms.float32), "down_bias")
        self.up_weight = Parameter(initializer("zeros", (outputs, size), ms.float32), "up_weight")
        self.up_bias = Parameter(initializer("zeros", (outputs,), ms.float32), "up_bias")
        self.activation_name = activation
        self.activation = FUNCTIONS[activation]
        self.residual_scaling = scaling
        self.down = self.base.operators.product()
        self.up = self.base.operators.product()
        self.add = ops.BiasAdd()

    @property
    def spec(self) -> BottleneckSpec:
        return self._spec

    def tensors(self) -> dict[str, Parameter]:
        parameters = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return dict(zip(TENSORS, parameters, strict=True))

    def shape_key(self) -> tuple:
        return (super().shape_key(), self.activation_name, self.residual_scaling, self._spec, self.parallel)

    def merge(self) -> nn.Cell:
        raise LoraMsError(NOT_MERGED)

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape((-1, shape[-1]))
        h = self.base(x)  # [t, out]
        z = x if self.parallel else h
        low = self.activation(self.add(self.down(z, self.down_weight), self.down_bias.astype(h.dtype)))
        added = self.add(self.up(low, self.up_weight), self.up_bias.astype(h.dtype))
        return (h + added * self.residual_scaling).reshape(shape[:-1] + (-1,))


def build(config: "BottleneckConfig", target: Target, spec: BottleneckSpec) -> AdapterCell:
    """See ``AdapterConfig.build``."""
    if isinstance(target.layer, Embedding | Head):
        raise LoraMsError(
            f"bottleneck adapters stand behind dense layers, not behind {target.name}: leave it out of target_modules"
        )
    return BottleneckDense(
        target.layer,
        spec,
        config.adapter_activation,
        config.residual_scaling,
        operators=target.operators,
        parallel=config.is_parallel,
    )
