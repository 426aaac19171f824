"""What methods share that train vectors for virtual tokens, which stand before the tokens of every row.

Virtual token i has the id ``vocabulary + i``. The data, the generator and ``CausalLM`` put these ids in front of every
row (``CausalLM.leading_ids``): so each row of a packed line sees its own, at positions from 0 on, and nothing else of
the model knows of them but the cells of the method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from lora_ms.adapters.matching import EMBEDDINGS, leaf_of
from lora_ms.adapters.methods.base import AdapterConfig, Cost, Shape, Update, keys_of, option
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import Rank
from lora_ms.storage import Entry
from lora_ms.values import Bounds, Targets, Whole

EMBEDDING = "model.embed_tokens"
TENSOR = "prompt_embeddings"  # [virtual tokens, h]; the key, too
NOT_MERGED = "virtual tokens are no weights, and cannot be merged into any: load them beside the model"


class PromptSpec(NamedTuple):
    """Virtual tokens of the embedding."""

    num_virtual_tokens: int


@dataclass(frozen=True)
class VirtualTokensConfig(AdapterConfig):
    """The options of all of them. Which modules they are on is no choice: the embedding, and what a method adds.

    Raises:
        LoraMsError: an option that names modules is given.
    """

    PEFT_REQUIRED: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)
    PEFT_PLACING: ClassVar[tuple[str, ...]] = ()
    PEFT_KEYS: ClassVar[Mapping[str, Any]] = {
        "num_virtual_tokens": Rank,
        "token_dim": Rank,
        "num_layers": Rank,
        "num_attention_heads": Rank,
        "num_transformer_submodules": Rank,
        "encoder_hidden_size": Rank,
    }
    TENSORS: ClassVar[tuple[str, ...]] = (TENSOR,)
    ROOT_TENSORS: ClassVar[Mapping[str, str]] = {TENSOR: EMBEDDING}
    SPEC_KEYS: ClassVar[Mapping[str, frozenset[str]]] = {"num_virtual_tokens": frozenset(("num_virtual_tokens",))}
    PLACING: ClassVar[frozenset[str]] = frozenset()

    target_modules: str | tuple[str, ...] = option(("embed_tokens",), Targets)
    num_virtual_tokens: int = option(20, Whole, Bounds(ge=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in keys_of(AdapterConfig):
            value = getattr(self, name)
            if value and (name, value) != ("target_modules", ("embed_tokens",)):
                raise LoraMsError(f"{name} with pet_type {self.PET_TYPE}: leave it out, virtual tokens have no modules")

    def choose(self, name: str) -> PromptSpec | None:
        return self.spec(name) if leaf_of(name) in EMBEDDINGS else None

    def spec(self, name: str) -> PromptSpec:
        return PromptSpec(self.num_virtual_tokens)

    @property
    def merges(self) -> bool:
        return False

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    # PEFT's files

    def to_peft(self, specs: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """What is null there, PEFT reads from the model."""
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "token_dim": None,
            "num_layers": None,
            "num_attention_heads": None,
        }

    def shapes(self, name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool) -> dict[str, Shape]:
        return {TENSOR: (self.num_virtual_tokens, weight[-1])}

    def update(self, name: str, tensors: Mapping[str, Entry]) -> Update:
        raise LoraMsError(f"{self.title}: {NOT_MERGED}")

    def describe(self) -> str:
        return f"{self.title}, {self.num_virtual_tokens} virtual tokens"

    def cost(self, spec: PromptSpec, inputs: int, outputs: int) -> Cost:
        """The cost on the embedding, whose outputs are h; the longer rows are not counted."""
        return Cost(trained=self.num_virtual_tokens * outputs, kept=0)

    def identity(self) -> dict[str, object]:
        return {"num_virtual_tokens": self.num_virtual_tokens}
