"""Rules that leave rows out before they are tokenised, each of them counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from lora_ms.data.example import Completion, Example, Message, TokenRow
from lora_ms.data.fields import RowFault
from lora_ms.data.formats import Row


@dataclass(frozen=True)
class Clean:
    """What to leave out; nothing by default, where a faulty row stops the run."""

    required: tuple[str, ...] = ()  # columns that must not be empty
    min_chars: int = 0  # of a row's questions and answers together
    max_chars: int = 0  # 0: any number
    trim: bool = False  # white space around every text
    dedupe: bool = False  # later rows with the same questions (plain text: the same text)
    skip_faulty: bool = False  # count rows that cannot be used, and go on


class Cleaner:
    """Applies the rules to one row after another and counts in ``skipped`` what they leave out."""

    def __init__(self, rules: Clean, skipped: Counter[str]) -> None:
        self.rules, self.skipped = rules, skipped
        self.seen: set[bytes] = set()

    def accept(self, row: Mapping[str, Any]) -> bool:
        """Before parsing: whether all required columns hold something."""
        empty = [key for key in self.rules.required if not str("" if row.get(key) is None else row[key]).strip()]
        if empty:
            self.skipped[f"{empty[0]} is empty"] += 1
        return not empty

    def fault(self, where: str, fault: RowFault) -> None:
        """A row that cannot be used, with ``skip_faulty``."""
        self.skipped[fault.kind] += 1

    def keep(self, row: Row) -> Row | None:
        """After parsing: the row, trimmed if so wished; None to leave it out."""
        if isinstance(row, TokenRow):
            return row
        if self.rules.trim:
            row = _trimmed(row)
        texts = _texts(row)
        length = sum(map(len, texts))
        if length < self.rules.min_chars or (self.rules.max_chars and length > self.rules.max_chars):
            self.skipped["too short" if length < self.rules.min_chars else "too long in characters"] += 1
            return None
        if self.rules.dedupe:
            key = blake2b("\0".join(_questions(row)).encode(), digest_size=12).digest()
            if key in self.seen:
                self.skipped["duplicate"] += 1
                return None
            self.seen.add(key)
        return row


def _trimmed(row: Example | Completion) -> Example | Completion:
    if isinstance(row, Completion):
        return replace(row, prompt=row.prompt.lstrip(), completion=row.completion.rstrip())
    messages = tuple(Message(message.role, message.content.strip()) for message in row.messages)
    return replace(row, messages=messages, input=row.input.strip())


def _texts(row: Example | Completion) -> list[str]:
    if isinstance(row, Completion):
        return [row.prompt, row.completion]
    return [message.content for message in row.messages if message.role != "system"]


def _questions(row: Example | Completion) -> list[str]:
    if isinstance(row, Completion):
        return [row.prompt or row.completion]
    return [message.content for message in row.messages if message.role != "assistant"]
