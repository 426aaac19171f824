"""Prefix tuning (Li and Liang, 2021): trained keys and values that every layer sees before those of a row.

Without ``prefix_projection`` the keys and values train themselves, which is P-tuning v2 (Liu et al., 2022). With it
they come out of a network: ``W tanh(V e + b) + c`` of a vector e for each virtual token.

PEFT's file holds one matrix [virtual tokens, layers * 2 * key width]: of each layer the keys, then the values. They are
not rotated, and the row's own tokens are at positions after theirs. Ours holds the network beside them, so that a run
can go on, which PEFT does not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_ms.adapters.matching import leaf_of
from lora_ms.adapters.methods.base import Cost, Shape, Target, option
from lora_ms.adapters.methods.virtual import EMBEDDING, TENSOR, PromptSpec, VirtualTokensConfig
from lora_ms.values import Bounds, Flag, Whole

if TYPE_CHECKING:
    from mindspore import nn

    from lora_ms.adapters.methods.base_cells import AdapterCell

KEYS = "k_proj"  # the module whose outputs are keys
NETWORK = (
    "prompt_encoder.embedding.weight",
    "prompt_encoder.transform.0.weight",
    "prompt_encoder.transform.0.bias",
    "prompt_encoder.transform.2.weight",
    "prompt_encoder.transform.2.bias",
)


@dataclass(frozen=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Prefix tuning, with PEFT's settings.

    Args:
        num_virtual_tokens: number of keys and values before every row.
        prefix_projection: whether a network produces them.
        encoder_hidden_size: width of that network, which PEFT's files do not contain.

    Raises:
        LoraMsError: a value out of range.
    """

    PET_TYPE: ClassVar[str] = "prefix"
    PEFT_TYPE: ClassVar[str] = "PREFIX_TUNING"
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {**VirtualTokensConfig.PEFT_KEYS, "prefix_projection": bool}
    TENSORS: ClassVar[tuple[str, ...]] = (TENSOR, *NETWORK)
    ROOT_TENSORS: ClassVar[Mapping[str, str]] = dict.fromkeys((TENSOR, *NETWORK), EMBEDDING)
    PARAMETERS: ClassVar[tuple[str, ...]] = ("layer_prefix",)

    prefix_projection: bool = option(False, Flag)
    encoder_hidden_size: int = option(128, Whole, Bounds(ge=1))
    layers: int = field(default=0, kw_only=True)  # of the model; see ``fitted``
    width: int = field(default=0, kw_only=True)  # of a layer's keys

    @property
    def title(self) -> str:
        return "prefix tuning"

    def fitted(self, shapes: Mapping[str, Shape]) -> "PrefixTuningConfig":
        found = [shape for name, shape in shapes.items() if leaf_of(name) == KEYS]
        return replace(self, layers=len(found), width=found[0][0]) if found else self

    def build(self, target: Target, spec: PromptSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import prefix_cells

        return prefix_cells.build(self, target)

    def beside(self, cells: Mapping[str, "nn.Cell"], built: Mapping[str, "nn.Cell"]) -> "Mapping[str, nn.Cell]":
        from lora_ms.adapters.methods import prefix_cells

        return prefix_cells.beside(cells, built)

    def network(self) -> dict[str, Shape]:
        """Names (PEFT's) and shapes of the network."""
        hidden = self.encoder_hidden_size
        outputs = self.layers * 2 * self.width
        shapes = ((self.num_virtual_tokens, self.width), (hidden, self.width), (hidden,), (outputs, hidden), (outputs,))
        return dict(zip(NETWORK, shapes, strict=True))

    # PEFT's files

    def to_peft(self, specs: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        both = {"prefix_projection": self.prefix_projection, "encoder_hidden_size": self.encoder_hidden_size}
        return {**super().to_peft(specs, targets), **both}

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "PrefixTuningConfig":
        return cls(
            num_virtual_tokens=peft["num_virtual_tokens"],
            prefix_projection=bool(peft.get("prefix_projection")),
            encoder_hidden_size=peft.get("encoder_hidden_size") or 128,
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        network = self.network() if any(tensor in found for tensor in NETWORK) else {}
        return {TENSOR: (self.num_virtual_tokens, self.layers * 2 * self.width), **network}

    def describe(self) -> str:
        kind = ", from a network" if self.prefix_projection else ""
        return f"{super().describe()}{kind}"

    def cost(self, spec: PromptSpec, inputs: int, outputs: int) -> Cost:
        """The cost of ``fitted`` settings."""
        trained = self.num_virtual_tokens * self.layers * 2 * self.width
        if self.prefix_projection:
            trained = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in self.network().values())
        return Cost(trained=trained, kept=0)
