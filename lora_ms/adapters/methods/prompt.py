"""Prompt tuning (Lester et al., 2021): a trained vector for each virtual token, in place of an embedding's row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_ms.adapters.methods.base import Target, option
from lora_ms.adapters.methods.virtual import PromptSpec, VirtualTokensConfig
from lora_ms.errors import LoraMsError
from lora_ms.values import Text, Whole

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(frozen=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Prompt tuning, with PEFT's settings.

    Args:
        num_virtual_tokens: number of vectors before every row.
        prompt_tuning_init: RANDOM (normal numbers), SAMPLE_VOCAB (random rows of the embedding) or TEXT.
        prompt_tuning_init_text: text whose token embeddings they start from, repeated or cut to fit.
        init_token_ids: token ids of that text; by default the tokenizer gives them.

    Raises:
        LoraMsError: a text without ``TEXT``, or ``TEXT`` without a text.
    """

    PET_TYPE: ClassVar[str] = "prompt"
    PEFT_TYPE: ClassVar[str] = "PROMPT_TUNING"
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {
        **VirtualTokensConfig.PEFT_KEYS,
        "prompt_tuning_init": str,
        "prompt_tuning_init_text": str,
        "tokenizer_name_or_path": str,
    }
    PARAMETERS: ClassVar[tuple[str, ...]] = ("prompt_embeddings",)

    prompt_tuning_init: str = option("RANDOM", Literal[INITS])
    prompt_tuning_init_text: str = option("", Text)
    init_token_ids: tuple[int, ...] = option((), list[Whole])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise LoraMsError(f"prompt_tuning_init {self.prompt_tuning_init!r} is none of {', '.join(INITS)}")
        object.__setattr__(self, "init_token_ids", tuple(self.init_token_ids))
        given = bool(self.prompt_tuning_init_text or self.init_token_ids)
        if given != (self.prompt_tuning_init == "TEXT"):
            raise LoraMsError("prompt_tuning_init TEXT and prompt_tuning_init_text go together: give both, or neither")

    @property
    def title(self) -> str:
        return "prompt tuning"

    def reading(self, tokenizer: Any) -> "PromptTuningConfig":
        if self.prompt_tuning_init != "TEXT" or self.init_token_ids:
            return self
        if tokenizer is None:
            raise LoraMsError(
                "prompt_tuning_init_text needs a tokenizer: give init_token_ids, the ids of the text, in its place"
            )
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        return replace(self, init_token_ids=tuple(ids))

    def build(self, target: Target, spec: PromptSpec) -> "AdapterCell":
        from lora_ms.adapters.methods import prompt_cells

        return prompt_cells.build(self, target, spec)

    def to_peft(self, specs: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """How the vectors began is over, and PEFT would ask for a tokenizer."""
        return {**super().to_peft(specs, targets), "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any]) -> "PromptTuningConfig":
        return cls(num_virtual_tokens=peft["num_virtual_tokens"])
