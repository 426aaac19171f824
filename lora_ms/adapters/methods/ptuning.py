"""P-tuning (Liu et al., 2021): the vectors of the virtual tokens come out of a small network, which trains with them.

``vectors = encoder(embedding)`` with embedding [virtual tokens, h]; the encoder is an MLP of three layers, or an LSTM
in both directions with an MLP of two. PEFT's file holds the vectors alone; ours holds the network beside them, so that
a run can go on, which PEFT does not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_ms.adapters.methods.base import Cost, Shape, Target, option
from lora_ms.adapters.methods.virtual import EMBEDDING, TENSOR, PromptSpec, VirtualTokensConfig
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import Probability, Rank
from lora_ms.values import Bounds, Whole

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

ENCODERS = ("MLP", "LSTM")
LAYERS = 2  # of the LSTM, PEFT's default
ENCODER = "prompt_encoder."
MLP_NAMES = {"MLP": (0, 2, 4), "LSTM": (0, 2)}  # places of the dense layers in PEFT's sequence


def network_shapes(kind: str, hidden: int, size: int, tokens: int) -> dict[str, Shape]:
    """Names (PEFT's) and shapes of what trains, for vectors of ``size`` numbers."""
    found: dict[str, Shape] = {"embedding.weight": (tokens, size)}
    if kind == "LSTM":
        for layer in range(LAYERS):
            for suffix in (f"l{layer}", f"l{layer}_reverse"):
                inputs = size if layer == 0 else 2 * hidden
                found[f"lstm_head.weight_ih_{suffix}"] = (4 * hidden, inputs)
                found[f"lstm_head.weight_hh_{suffix}"] = (4 * hidden, hidden)
                found[f"lstm_head.bias_ih_{suffix}"] = (4 * hidden,)
                found[f"lstm_head.bias_hh_{suffix}"] = (4 * hidden,)
        widths: tuple[int, ...] = (2 * hidden, 2 * hidden, size)
    else:
        widths = (size, hidden, hidden, size)
    for number, place in enumerate(MLP_NAMES[kind]):
        found[f"mlp_head.{place}.weight"] = (widths[number + 1], widths[number])
        found[f"mlp_head.{place}.bias"] = (widths[number + 1],)
    return {f"{ENCODER}{name}": shape for name, shape in found.items()}


NAMES = tuple(dict.fromkeys(name for kind in ENCODERS for name in network_shapes(kind, 1, 1, 1)))


@dataclass(frozen=True)
class PTuningConfig(VirtualTokensConfig):
    """P-tuning, with PEFT's settings.

    Args:
        num_virtual_tokens: number of vectors before every row.
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: width of that network, which PEFT's files do not contain.

    Raises:
        LoraMsError: a value out of range.
    """

    PET_TYPE: ClassVar[str] = "ptuning"
    PEFT_TYPE: ClassVar[str] = "P_TUNING"
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {
        "encoder_reparameterization_type": str,
        "encoder_hidden_size": Rank,
        "encoder_num_layers": Rank,
        "encoder_dropout": Probability,
    }
    TENSORS: ClassVar[tuple[str, ...]] = (TENSOR, *NAMES)
    ROOT_TENSORS: ClassVar[Mapping[str, str]] = dict.fromkeys((TENSOR, *NAMES), EMBEDDING)
    PARAMETERS: ClassVar[tuple[str, ...]] = ("vectors_alone", "network")

    encoder_reparameterization_type: str = option("MLP", Literal[ENCODERS])
    encoder_hidden_size: int = option(128, Whole, Bounds(ge=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind not in ENCODERS:
            raise LoraMsError(f"encoder_reparameterization_type {kind!r} is none of {', '.join(ENCODERS)}")

    @property
    def title(self) -> str:
        return "P-tuning"

    def build(self, target: Target, spec: PromptSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import ptuning_cells

        return ptuning_cells.build(self, target, spec)

    def network(self, size: int) -> dict[str, Shape]:
        """``network_shapes`` of these settings."""
        kind = self.encoder_reparameterization_type
        return network_shapes(kind, self.encoder_hidden_size, size, self.num_virtual_tokens)

    def to_peft(self, specs: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        return {
            **super().to_peft(specs, targets),
            "encoder_reparameterization_type": self.encoder_reparameterization_type,
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": LAYERS,
            "encoder_dropout": 0.0,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "PTuningConfig":
        return cls(
            num_virtual_tokens=peft["num_virtual_tokens"],
            encoder_reparameterization_type=peft.get("encoder_reparameterization_type") or "MLP",
            encoder_hidden_size=peft.get("encoder_hidden_size") or 128,
        )

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        network = self.network(weight[-1]) if any(tensor in found for tensor in NAMES) else {}
        return {**super().shapes(name, found, weight, has_bias), **network}

    def cost(self, spec: PromptSpec, inputs: int, outputs: int) -> Cost:
        trained = 0
        for shape in self.network(outputs).values():
            trained += shape[0] * (shape[1] if len(shape) > 1 else 1)
        return Cost(trained=trained, kept=0)
