"""LoRA and DoRA on an embedding, whose weight is [vocabulary, h]: ids look up a column of A.

PEFT stores the transposed of what it stores of a dense layer: A [rank, vocabulary] and B [h, rank], and the update of
the weight is ``scaling (B A)^T``. DoRA's magnitudes are those of the h columns.
"""

from collections.abc import Iterable, Mapping

from lora_ms.adapters.matching import EMBEDDINGS, leaf_of
from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.base import Array, Shape, Update
from lora_ms.storage import Entry

TENSORS = ("lora_embedding_A", "lora_embedding_B")


def is_stored(tensors: Iterable[str]) -> bool:
    """Whether a module with these tensors is an embedding."""
    return any(name in TENSORS for name in tensors)


def is_embedding(name: str) -> bool:
    """Whether the module at path ``name`` is one."""
    return leaf_of(name) in EMBEDDINGS


def shapes(lora_rank: int, weight: Shape, use_dora: bool) -> dict[str, Shape]:
    """Names and shapes of the stored tensors."""
    vocabulary, hidden = weight[0], weight[-1]
    wanted: dict[str, Shape] = {"lora_embedding_A": (lora_rank, vocabulary), "lora_embedding_B": (hidden, lora_rank)}
    return wanted | ({"lora_magnitude_vector": (hidden,)} if use_dora else {})


class EmbeddingUpdate(Update):
    """``W + scaling (B A)^T``, or with DoRA its columns brought to the magnitudes."""

    def __init__(self, tensors: Mapping[str, Entry], scaling: float):
        super().__init__(tensors)
        self.scaling = scaling
        self.by_rows = "lora_magnitude_vector" not in tensors

    def weight(self, weight: Array, rows: slice) -> Array:
        magnitude = self.tensor("lora_magnitude_vector") if "lora_magnitude_vector" in self.tensors else None
        a, b = self.tensor("lora_embedding_A"), self.tensor("lora_embedding_B")
        return lowrank.merged_weight(weight.T, a[:, rows], b, self.scaling, magnitude).T
