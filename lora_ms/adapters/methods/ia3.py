"""IA3 (Liu et al., 2022): a trained vector scales what a layer gives, or what it takes.

``y = l * (x W^T + b)`` with l [out]; of feed-forward modules ``y = (l * x) W^T + b`` with l [in]. l starts as ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lora_ms.adapters.matching import check_listed, ends_with, leaf_of, matches
from lora_ms.adapters.methods.base import (
    AdapterConfig,
    Array,
    Cost,
    Shape,
    Target,
    Update,
    option,
    shared_options,
)
from lora_ms.errors import LoraMsError
from lora_ms.storage import Entry
from lora_ms.values import Exclusions, Flag, Targets

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

TENSOR = "ia3_l"  # [out, 1], or [1, in] of a feed-forward module


class IA3Spec(NamedTuple):
    """IA3 on one module."""

    feedforward: bool  # whether the input is scaled, in place of the output


@dataclass(frozen=True, repr=False)
class IA3Config(AdapterConfig):
    """IA3, with PEFT's settings.

    Args:
        target_modules, exclude_layers, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in
            ``LoraConfig``, except that the embedding cannot be a target.
        feedforward_modules: the targets whose input is scaled: a regular expression, as in target_modules, or
            a list of path suffixes.
        init_ia3_weights: True: the vectors start as ones, so that a fresh adapter changes nothing; False: as random
            normal numbers.

    Raises:
        LoraMsError: two lists are given, and feedforward_modules names more than target_modules.
    """

    PET_TYPE: ClassVar[str] = "ia3"
    PEFT_TYPE: ClassVar[str] = "IA3"
    TENSORS: ClassVar[tuple[str, ...]] = (TENSOR,)
    PARAMETERS: ClassVar[tuple[str, ...]] = (TENSOR,)
    IDLE: ClassVar[Mapping[str, float]] = {TENSOR: 1.0}
    IDLE_CHECK: ClassVar[tuple[str, str]] = ("l not one", "every l is one: IA3 changes nothing")
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {"feedforward": frozenset(("feedforward_modules",))}

    # PEFT's own choice for Llama and Qwen
    target_modules: str | tuple[str, ...] = option("k_proj|v_proj|down_proj", Targets)
    feedforward_modules: str | tuple[str, ...] = option("down_proj", Exclusions)
    init_ia3_weights: bool = option(True, Flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs, targets = self.feedforward_modules, self.target_modules
        if isinstance(inputs, str):
            return
        object.__setattr__(self, "feedforward_modules", tuple(inputs or ()))
        missing = [name for name in inputs or () if not isinstance(targets, str) and name not in targets]
        if missing:
            raise LoraMsError(
                f"feedforward_modules {', '.join(missing)} must be among target_modules {', '.join(targets)}: add them"
            )

    @property
    def title(self) -> str:
        return "IA3"

    def spec(self, name: str) -> IA3Spec:
        inputs = self.feedforward_modules
        if isinstance(inputs, str):
            return IA3Spec(bool(inputs) and matches(name, inputs))
        return IA3Spec(name.endswith(inputs))  # even amid a word, as PEFT has it

    def check_listed(self, names: Sequence[str]) -> None:
        super().check_listed(names)
        check_listed("feedforward_modules", self.feedforward_modules, names, str.endswith)

    def build(self, target: Target, spec: IA3Spec) -> "AdapterCell":
        from lora_ms.adapters.methods import ia3_cells

        return ia3_cells.build(self, target, spec)

    # PEFT's files

    def tells_paths_apart(self, specs: Mapping[str, IA3Spec]) -> bool:
        kinds = {(leaf_of(name), spec) for name, spec in specs.items()}
        return len(kinds) > len({leaf for leaf, _ in kinds})

    def to_peft(self, specs: Mapping[str, IA3Spec], targets: Sequence[str]) -> dict[str, Any]:
        """``feedforward_modules`` is a subset of ``targets``, in the same spelling: PEFT compares the names."""
        inputs = [name for name, spec in specs.items() if spec.feedforward]
        return {
            "feedforward_modules": [name for name in targets if any(ends_with(path, [name]) for path in inputs)],
            "init_ia3_weights": True,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "IA3Config":
        return cls(feedforward_modules=peft.get("feedforward_modules") or (), **shared_options(peft))

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        return {TENSOR: (1, weight[-1]) if self.spec(name).feedforward else (weight[0], 1)}

    def update(self, name: str, tensors: Mapping[str, Entry]) -> "IA3Update":
        return IA3Update(tensors, self.spec(name).feedforward)

    # training

    def cost(self, spec: IA3Spec, inputs: int, outputs: int) -> Cost:
        """The gradient of l needs what l multiplies: the module's own input, or its output."""
        return Cost(trained=inputs, kept=0) if spec.feedforward else Cost(trained=outputs, kept=outputs)


class IA3Update(Update):
    """Multiplies the rows of the weight and the bias by l; in a feed-forward module, the columns of the weight."""

    def __init__(self, tensors: Mapping[str, Entry], feedforward: bool):
        super().__init__(tensors)
        self.feedforward = feedforward

    @property
    def changes_bias(self) -> bool:
        return not self.feedforward

    def weight(self, weight: Array, rows: slice) -> Array:
        scale = self.tensor(TENSOR)
        return weight * (scale if self.feedforward else scale[rows])

    def bias(self, bias: Array) -> Array:
        return bias * self.tensor(TENSOR).reshape(-1)
