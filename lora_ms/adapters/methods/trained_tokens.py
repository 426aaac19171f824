"""Rows of the embedding, or of the head, that train by themselves (PEFT's ``trainable_token_indices``).

PEFT stores the rows as they are after training, [tokens, h], in the order in which the settings name the tokens; they
replace the model's. A head that is tied to the embedding has the embedding's rows, and none of its own in the file.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_ms.adapters.matching import EMBEDDINGS, HEADS, ends_with, leaf_of
from lora_ms.adapters.methods.base import Array, Shape, Update
from lora_ms.errors import LoraMsError
from lora_ms.storage import Entry

OPTION = "trainable_token_indices"
TENSOR = "token_adapter.trainable_tokens_delta"  # the rows themselves, whatever the name says
PARAMETER = "trained_tokens"

Tokens = tuple[int, ...]
TokenIndices = Tokens | Mapping[str, Tokens]  # of the embedding, or by the end of a module's path


def read(value: Any) -> list[int] | dict[str, list[int]] | None:
    """The option in YAML. Raises ValueError where it is another kind of value."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    names = list(value) if isinstance(value, dict) else []
    if value is None or (
        all(
            isinstance(each, list) and each and all(type(token) is int and token >= 0 for token in each)
            for each in lists
        )
        and all(isinstance(name, str) for name in names)
    ):
        return value
    raise ValueError("expects token ids such as [5, 17], or a mapping such as {embed_tokens: [5], lm_head: [5, 17]}")


def checked(value: Any) -> TokenIndices:
    """The option as it is kept, () for none. Raises LoraMsError where it is another kind of value."""
    if value is None or (isinstance(value, Sequence | Mapping) and not value):
        return ()

    def as_list(ids: Any) -> Any:
        return list(ids) if isinstance(ids, tuple) else ids

    plain = {name: as_list(ids) for name, ids in value.items()} if isinstance(value, Mapping) else as_list(value)
    try:
        read(plain)
    except ValueError as problem:
        raise LoraMsError(f"{OPTION} {problem}, got {plain}") from None
    for ids in plain.values() if isinstance(plain, dict) else [plain]:
        token, times = Counter(ids).most_common(1)[0]
        if times > 1:
            raise LoraMsError(f"{OPTION} names token {token} twice: give each once")
    return {name: tuple(ids) for name, ids in plain.items()} if isinstance(plain, dict) else tuple(plain)


def to_peft(indices: TokenIndices) -> list[int] | dict[str, list[int]]:
    """The option as adapter_config.json has it."""
    return {name: list(ids) for name, ids in indices.items()} if isinstance(indices, Mapping) else list(indices)


def modules(indices: TokenIndices, names: Iterable[str]) -> dict[str, Tokens]:
    """Whose rows train, among modules ``names`` of a model, and which.

    Raises:
        LoraMsError: a name that fits no embedding or head.
    """
    ends = [name for name in names if leaf_of(name) in (*EMBEDDINGS, *HEADS)]
    for suffix in indices if isinstance(indices, Mapping) else ():
        if not any(ends_with(name, [suffix]) for name in ends):
            raise LoraMsError(f"{OPTION} {suffix!r} is no embedding or head; there are: {', '.join(ends)}")
    return {name: tokens for name in ends if (tokens := tokens_of(indices, name))}


def stored_modules(indices: TokenIndices, names: Iterable[str]) -> dict[str, Tokens]:
    """``modules``, without a head of the embedding's tokens: it may be tied, and then the file has nothing of it."""
    found = modules(indices, names)
    embeddings = [tokens for name, tokens in found.items() if leaf_of(name) in EMBEDDINGS]
    return {name: tokens for name, tokens in found.items() if leaf_of(name) in EMBEDDINGS or tokens not in embeddings}


def tokens_of(indices: TokenIndices, name: str) -> Tokens:
    """Whose rows of module ``name`` train; () for none."""
    if isinstance(indices, Mapping):
        return next((ids for suffix, ids in indices.items() if ends_with(name, [suffix])), ())
    return indices if leaf_of(name) in EMBEDDINGS else ()


def shapes(tokens: Tokens, weight: Shape) -> dict[str, Shape]:
    """Name and shape of the stored rows of a module of this weight.

    Raises:
        LoraMsError: a token is not in its vocabulary.
    """
    check_vocabulary(tokens, weight[0])
    return {TENSOR: (len(tokens), weight[-1])}


def check_vocabulary(tokens: Tokens, vocab_size: int) -> None:
    """Raises LoraMsError where a token is none of so many."""
    beyond = max(tokens, default=-1)
    if beyond >= vocab_size:
        raise LoraMsError(f"{OPTION} names token {beyond}: the model's vocabulary has {vocab_size}")


class RowsUpdate(Update):
    """The weight with the rows of ``tokens`` replaced."""

    reaches_tied_head = True

    def __init__(self, tensors: Mapping[str, Entry], tokens: Tokens):
        super().__init__(tensors)
        self.tokens = np.array(tokens, np.int64)

    def weight(self, weight: Array, rows: slice) -> Array:
        here = (self.tokens >= rows.start) & (self.tokens < rows.start + len(weight))
        merged = weight.copy()
        merged[self.tokens[here] - rows.start] = self.tensor(TENSOR)[here]
        return merged

    def keeps_tie(self, other: Update) -> bool:
        if not isinstance(other, RowsUpdate) or not np.array_equal(self.tokens, other.tokens):
            return False
        return other is self or np.array_equal(self.tensor(TENSOR), other.tensor(TENSOR))
