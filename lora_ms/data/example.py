"""The types that a row of training data goes through: Example (text) -> TokenRow -> Batch."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Label of a token that is not learnt; the value that Hugging Face and MindFormers use."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | user | assistant | tool
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learnt."""

    where: str  # for error messages: "data.jsonl:12" (line), "data.json[3]" or "row 3" (counted from 1)
    messages: tuple[Message, ...]
    input: str = ""  # Alpaca's "input": the tail of the last user message, which only the Alpaca prompt sets apart


@dataclass(frozen=True)
class Completion:
    """Plain text, without a template: the prompt, perhaps empty, is read and the completion is learnt."""

    where: str
    prompt: str
    completion: str


# Not comparable: == on arrays has no single answer.
@dataclass(frozen=True, eq=False)
class TokenRow:
    """A tokenised row. labels[t] is input_ids[t] where that token is learnt, else -100: nothing is shifted yet."""

    where: str
    input_ids: NDArray[np.int32]  # [n]
    labels: NDArray[np.int32]  # [n]


class Batch(NamedTuple):
    """One micro-batch of b lines of s tokens, with the next-token targets as a list of c slots.

    A line holds one row, or several one after another; positions restart at 0 with each, and a token sees its own
    row alone. What follows the last row is padding, at positions 0, 1, 2 … of a row of its own.
    targets[i] is the token that follows flat position target_index[i] = line * s + t of input_ids.
    Slots past label_tokens are unused: target_index 0, targets -100.
    """

    input_ids: NDArray[np.int32]  # [b, s]
    position_ids: NDArray[np.int32]  # [b, s]
    target_index: NDArray[np.int32]  # [c]
    targets: NDArray[np.int32]  # [c]
    tokens: int  # of the rows, whether computed or not
    fed: int  # tokens of input_ids that are not padding
    label_tokens: int  # used slots
