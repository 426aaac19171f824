"""The types that a row of training data passes through, in their order.

    RawRow                        a line of a file                              readers.py
    Example, Completion           a conversation; a text without a template     formats.py
    Preference                    two of these, one of which is liked           preferences.py
    TokenRow                      its tokens and labels                         template.py
    TokenStore                    the rows of a dataset, in flat arrays         store.py
    Batch, DeviceBatch            rows of one step, in a fixed shape            collate.py, loader.py

Rows that come as token ids are TokenRows from the beginning.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Label of a token that is not learnt; the value that Hugging Face and MindFormers use."""


THINK, END_THINK = "<think>", "</think>"  # around it in a text
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which datasets and chat templates have what an assistant thought before its answer."""


class RowFault(Exception):
    """A row that cannot be used: `text` says what is wrong with it, `advice` what to do."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.text = text
        self.advice = advice

    @property
    def kind(self) -> str:
        """What is wrong, in words that many rows share: without numbers and quoted parts."""
        return re.sub(r"\([^()]*\)|\d+", "…", self.text.split(":")[0])


MOST_BYTES = 16 * 2**20
"""Length of a row: four million tokens, many times what a model takes. Tokenising takes some 25 times as much."""


def too_long() -> RowFault:
    """What is wrong with a row of more than ``MOST_BYTES``."""
    return RowFault(f"longer than {MOST_BYTES >> 20} MB", "cut it into several rows")


def shown_name(path: Path) -> str:
    """The name of a file as text: bytes of it that are not UTF-8 as \\xca and the like."""
    return path.name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class RawRow(NamedTuple):
    """One row as it stands in a file: a line of JSON, an entry of a list, a line of a table."""

    file: Path | None  # None for rows that were given as a list. The rows of a file have one format
    where: str  # for error messages: "data.jsonl:12" (line), "data.json[3]" or "row 3" (counted from 1)
    value: Any  # the columns, a mapping; a RowFault where the row could not be read


class ToolData(NamedTuple):
    """The tools of a conversation, or a turn's calls of them."""

    items: list[Any]  # for chat templates that take a list: tools or calls, as the row has them, parsed from JSON
    text: str  # for chat templates that do not: the same as JSON


def function_of(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a tool or of a call that has its name: OpenAI's lists wrap it."""
    function = item.get("function")
    return function if isinstance(function, Mapping) else item


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | user | assistant | tool
    content: str
    reasoning: str = ""  # what an assistant thought before it answered; "" also where `content` holds it in <think>
    tool_calls: ToolData | None = None  # of an assistant
    name: str = ""  # of the tool that answers
    tool_call_id: str = ""  # of the call that a tool answers
    learnt: bool = True  # False: an assistant's turn that is only read


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learnt."""

    where: str
    messages: tuple[Message, ...]
    input: str = ""  # Alpaca's "input": the tail of the last user message, which only the Alpaca prompt sets apart
    tools: ToolData | None = None
    liked: bool = True  # False: an answer that is not wanted, in data of preferences


@dataclass(frozen=True)
class Completion:
    """Plain text, without a template: the prompt, perhaps empty, is read and the completion is learnt."""

    where: str
    prompt: str
    completion: str
    liked: bool = True  # as in ``Example``


@dataclass(frozen=True)
class Preference:
    """Two answers to the same question. They become two rows of tokens, one after the other, under one name."""

    where: str
    chosen: Example | Completion
    rejected: Example | Completion


# Not comparable: == on arrays has no single answer.
@dataclass(frozen=True, eq=False)
class TokenRow:
    """A tokenised row. labels[t] is input_ids[t] where that token is learnt, else -100: nothing is shifted yet."""

    where: str
    input_ids: NDArray[np.int32]  # [n]
    labels: NDArray[np.int32]  # [n]
    liked: bool = True  # False: an answer that is not wanted, in data of preferences

    @property
    def learnt(self) -> NDArray[np.int64]:
        """Positions of the tokens that are learnt. Position 0 never is: no token comes before it to predict it."""
        return np.flatnonzero(self.labels[1:] != IGNORE_INDEX) + 1

    @property
    def input_length(self) -> int:
        """Number of leading tokens that the model must see: those before the last learnt one."""
        learnt = self.learnt
        return int(learnt[-1]) if learnt.size else 0


Row = Example | Completion | Preference | TokenRow


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
    tokens: int  # of the rows, those after the last target included
    input_tokens: int  # tokens of input_ids that are not padding
    label_tokens: int  # used slots
    extras: tuple[NDArray[Any], ...] = ()  # what further terms of the loss need, see ``loader.TermRows``


class DeviceBatch(NamedTuple):
    """The arrays of a Batch as MindSpore Tensors."""

    input_ids: Any  # [b, s] int32
    position_ids: Any  # [b, s] int32
    target_index: Any  # [c] int32
    targets: Any  # [c] int32
    extras: tuple[Any, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """All arrays, as a training step takes them."""
        return (*self[:4], *self.extras)


class DeviceStep(NamedTuple):
    """One optimiser step of one rank."""

    batches: list[DeviceBatch]  # perhaps none: then this rank only takes part in the sums over the ranks
    tokens: int  # of this rank's rows
    label_tokens: int  # on all ranks
