"""Questions with several answers to choose from, of which one is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_ms.data.example import Example, Message, RowFault, TokenRow
from lora_ms.data.readers import read_as
from lora_ms.data.template import encode_rows
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = ("question", "query", "prompt", "instruction")
CHOICES = ("choices", "options")
ANSWER = ("answer", "answerKey", "label")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ChoiceRow(NamedTuple):
    """One question."""

    where: str
    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right one


def read_choices(source: str, num_samples: int | None = None) -> list[ChoiceRow]:
    """The questions of a file, folder or glob: ``question``, ``choices`` and ``answer``.

    ``choices`` is a list of texts, or ARC's ``{text: […], label: […]}``; ``answer`` (or ``answerKey``) the number of
    the right one, from 0, its letter or label, or its text.

    Raises:
        LoraMsError: a row that is none, with its file and line.
    """
    found = read_as(source, _choice_row, num_samples)
    if not found:
        raise LoraMsError(f"{source}: no rows")
    return found


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else ""
        raise RowFault(f"no {names[0]}; the row has {keys}", "give question, choices and answer")
    return row[name]


def _choice_row(where: str, row: Any) -> ChoiceRow:
    if not isinstance(row, Mapping):
        raise RowFault("not a mapping", "give question, choices and answer")
    question, choices, answer = (_first(row, names) for names in (QUESTION, CHOICES, ANSWER))
    labels: list[Any] = []
    if isinstance(choices, Mapping):
        labels, choices = list(choices.get("label") or []), choices.get("text")
    texts = [str(choice) for choice in choices] if isinstance(choices, list | tuple) else []
    if len(texts) < 2 or len(texts) > len(LETTERS):
        raise RowFault(f"choices is no list of 2 to {len(LETTERS)} texts", "give the answers to choose from as a list")
    labels = labels or list(LETTERS[: len(texts)])
    if type(answer) is int and 0 <= answer < len(texts):
        right = answer
    elif answer in labels and len(labels) == len(texts):
        right = labels.index(answer)
    elif answer in texts:
        right = texts.index(answer)
    else:
        raise RowFault(
            f"answer {answer!r:.60} is none of the choices", "give its number from 0, its letter or its text"
        )
    return ChoiceRow(where, str(question), tuple(texts), right)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow], seq_length: int
) -> tuple[list[TokenRow], list[int]]:
    """A row for each choice of each question, as an answer to it; and the number of choices of each question.

    Raises:
        LoraMsError: one that is longer than ``seq_length`` tokens.
    """
    examples = [
        Example(row.where, (Message("user", row.question), Message("assistant", choice)))
        for row in rows
        for choice in row.choices
    ]
    found = [tokens for encoded in encode_rows(tokenizer, examples) for tokens in encoded.rows]
    long = next((row for row in found if len(row.input_ids) > seq_length), None)
    if long is not None:
        raise LoraMsError(f"{long.where}: {len(long.input_ids)} tokens, and seq_length is {seq_length}: raise it")
    return found, [len(row.choices) for row in rows]
