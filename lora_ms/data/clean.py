"""Rules that leave rows out before they are tokenised, each of them counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b

from lora_ms.data.example import Completion, Example, Preference, RawRow, Row, RowFault, TokenRow


@dataclass(frozen=True)
class CleaningRules:
    """What to leave out; nothing by default, where a faulty row stops the run."""

    required: tuple[str, ...] = ()  # columns that must not be empty
    min_chars: int = 0  # of a row's questions and answers together
    max_chars: int = 0  # 0: any number
    trim: bool = False  # white space around every text
    dedupe: bool = False  # later rows with the same questions (plain text: the same text)
    skip_faulty: bool = False  # count rows that cannot be used, and go on


class Cleaner:
    """Applies the rules to one row after another and counts in ``skipped``, by reason, the rows that they leave out."""

    def __init__(self, rules: CleaningRules, skipped: Counter[str]) -> None:
        self.rules = rules
        self.skipped = skipped
        self.seen: set[bytes] = set()  # digests of the questions so far

    def with_required(self, rows: Iterable[RawRow]) -> Iterator[RawRow]:
        """The rows in which no required column is empty."""
        for row in rows:
            empty = self._empty_column(row)
            if empty is None:
                yield row
            else:
                self.skipped[f"{empty} is empty"] += 1

    def _empty_column(self, row: RawRow) -> str | None:
        if not isinstance(row.value, Mapping):
            return None
        for column in self.rules.required:
            value = row.value.get(column)
            if value is None or not str(value).strip():
                return column
        return None

    def count_fault(self, fault: RowFault) -> None:
        """Counts a row that cannot be used, with ``skip_faulty``."""
        self.skipped[fault.kind] += 1

    def cleaned(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that the rules keep, trimmed where the rules say so."""
        for row in rows:
            if not isinstance(row, TokenRow):
                if self.rules.trim:
                    row = _each_trimmed(row)
                reason = self._reason_to_skip(row.chosen if isinstance(row, Preference) else row)
                if reason:
                    self.skipped[reason] += 1
                    continue
            yield row

    def _reason_to_skip(self, row: Example | Completion) -> str:
        length = sum(map(len, _texts(row)))
        if length < self.rules.min_chars:
            return "too short"
        if self.rules.max_chars and length > self.rules.max_chars:
            return "too long in characters"
        if self.rules.dedupe:
            digest = blake2b("\0".join(_questions(row)).encode(), digest_size=12).digest()
            if digest in self.seen:
                return "duplicate"
            self.seen.add(digest)
        return ""


def _each_trimmed(row: Example | Completion | Preference) -> Example | Completion | Preference:
    if isinstance(row, Preference):
        return replace(row, chosen=_trimmed(row.chosen), rejected=_trimmed(row.rejected))
    return _trimmed(row)


def _trimmed(row: Example | Completion) -> Example | Completion:
    if isinstance(row, Completion):
        return replace(row, prompt=row.prompt.lstrip(), completion=row.completion.rstrip())
    messages = tuple(message._replace(content=message.content.strip()) for message in row.messages)
    return replace(row, messages=messages, input=row.input.strip())


def _texts(row: Example | Completion) -> list[str]:
    if isinstance(row, Completion):
        return [row.prompt, row.completion]
    return [message.content for message in row.messages if message.role != "system"]


def _questions(row: Example | Completion) -> list[str]:
    if isinstance(row, Completion):
        return [row.prompt or row.completion]
    return [message.content for message in row.messages if message.role != "assistant"]
