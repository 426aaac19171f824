"""Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2021): a small network behind a sub-layer's output; or,
parallel (He et al., 2022), beside a projection.

``y = h + scaling (act(z D^T + d) U^T + u)`` with h what the projection gives, D [size, width of z] and U [out, size].
z is h, or, parallel, the projection's input. D starts from small normal numbers and U as zeros, so that a fresh adapter
changes nothing. It cannot be merged: between the two matrices stands a function.

PEFT has no such adapters. The file is one of PEFT's in all else, of ``peft_type`` BOTTLENECK: by module
``adapter_down.weight``, ``adapter_down.bias``, ``adapter_up.weight``, ``adapter_up.bias``, and the options below by
their names in adapter_config.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lora_ms.adapters.methods.base import AdapterConfig, Cost, Shape, Target, Update, option, shared_options
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import Factor, Rank
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Exclusions, Number, Whole

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

STYLES = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",), "parallel": ("o_proj", "down_proj")}
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
TENSORS = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")
OPTIONS = ("bottleneck_size", "reduction_factor", "adapter_activation", "residual_scaling", "adapter_style")


class BottleneckSpec(NamedTuple):
    """A bottleneck adapter on one module."""

    bottleneck_size: int  # 0: by the factor
    reduction_factor: int

    def size(self, outputs: int) -> int:
        """Numbers between the two matrices."""
        return self.bottleneck_size or max(outputs // self.reduction_factor, 1)


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters.

    Args:
        adapter_style: houlsby: behind the attention's output and the MLP's; pfeiffer: behind the MLP's alone; parallel:
            beside both projections, from their inputs.
        target_modules: projections that get adapters, in place of those that the style names.
        exclude_layers, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in ``LoraConfig``.
        bottleneck_size: width between the two matrices; 0: the module's output width over ``reduction_factor``.
        reduction_factor: divides the module's output width, where ``bottleneck_size`` is 0.
        adapter_activation: relu, gelu, silu or tanh.
        residual_scaling: factor that multiplies the network's output.

    Raises:
        LoraMsError: a value out of range.
    """

    PET_TYPE: ClassVar[str] = "adapter"
    PEFT_TYPE: ClassVar[str] = "BOTTLENECK"
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {
        "bottleneck_size": int,
        "reduction_factor": Rank,
        "adapter_activation": str,
        "residual_scaling": Factor,
        "adapter_style": str,
    }
    TENSORS: ClassVar[tuple[str, ...]] = TENSORS
    PARAMETERS: ClassVar[tuple[str, ...]] = ("down_weight", "down_bias", "up_weight", "up_bias")
    IDLE: ClassVar[Mapping[str, float]] = {"adapter_up.weight": 0.0, "adapter_up.bias": 0.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("U not zero", "every U is zero: the adapters change nothing")
    AGREEING: ClassVar[tuple[str, ...]] = ("adapter_activation", "residual_scaling", "adapter_style")
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {
        name: frozenset(("bottleneck_size", "reduction_factor")) for name in BottleneckSpec._fields
    }
    PLACING: ClassVar[frozenset[str]] = AdapterConfig.PLACING | {"adapter_style"}

    target_modules: str | tuple[str, ...] = option((), Exclusions)  # (): the style's
    adapter_style: str = option("houlsby", Literal[tuple(STYLES)])
    bottleneck_size: int = option(0, Whole, Bounds(ge=0))
    reduction_factor: int = option(16, Whole, Bounds(ge=1))
    adapter_activation: str = option("relu", Literal[ACTIVATIONS])
    residual_scaling: float = option(1.0, Number, Bounds(gt=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_style not in STYLES:
            raise LoraMsError(f"adapter_style {self.adapter_style!r} is none of {', '.join(STYLES)}")
        if self.adapter_activation not in ACTIVATIONS:
            raise LoraMsError(f"adapter_activation {self.adapter_activation!r} is none of {', '.join(ACTIVATIONS)}")
        if not self.target_modules:
            object.__setattr__(self, "target_modules", STYLES[self.adapter_style])

    @property
    def title(self) -> str:
        return "bottleneck adapters"

    @property
    def merges(self) -> bool:
        return False

    @property
    def is_parallel(self) -> bool:
        return self.adapter_style == "parallel"

    def spec(self, name: str) -> BottleneckSpec:
        return BottleneckSpec(self.bottleneck_size, self.reduction_factor)

    def build(self, target: Target, spec: BottleneckSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import bottleneck_cells

        return bottleneck_cells.build(self, target, spec)

    # the file

    def to_peft(self, specs: Mapping[str, BottleneckSpec], targets: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "BottleneckConfig":
        given = {name: peft[name] for name in OPTIONS if peft.get(name) is not None}
        return cls(**given, **shared_options(peft))

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        outputs = weight[0]
        size = self.spec(name).size(outputs)
        width = weight[1] if self.is_parallel else outputs
        return dict(zip(TENSORS, ((size, width), (size,), (outputs, size), (outputs,)), strict=True))

    def update(self, name: str, tensors: Mapping[str, Entry]) -> Update:
        raise LoraMsError(NOT_MERGED)

    # training

    def identity(self) -> dict[str, object]:
        found = {name: getattr(self, name) for name in ("adapter_activation", "residual_scaling")}
        return {**found, "adapter_style": self.adapter_style} if self.is_parallel else found

    def cost(self, spec: BottleneckSpec, inputs: int, outputs: int) -> Cost:
        size = spec.size(outputs)
        width = inputs if self.is_parallel else outputs
        return Cost(trained=size * (width + outputs) + size + outputs, kept=outputs + 2 * size)


NOT_MERGED = (
    "bottleneck adapters cannot be merged, a function stands between their matrices: load them beside the model"
)
