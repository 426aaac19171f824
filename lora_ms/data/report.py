"""What became of the data, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 99)
NAMED = 10  # keys in one line
# first code point, script: what a text is written in says which languages it may be
SCRIPTS = (
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""), (0x00C0, "Latin"),
    (0x0250, ""), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, ""), (0x0590, "Hebrew"), (0x0600, "Arabic"),
    (0x0780, ""), (0x0900, "Devanagari"), (0x0980, "other"), (0x0E00, "Thai"), (0x0E80, "other"), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x3040, "Kana"), (0x3100, ""), (0x3400, "Han"), (0xA000, "other"),
    (0xAC00, "Hangul"), (0xD7B0, ""), (0xF900, "Han"), (0xFB00, ""), (0x10000, "other"), (0x1F000, "emoji"),
    (0x20000, "Han"), (0x323B0, ""),
)  # fmt: skip
STARTS = np.array([start for start, _ in SCRIPTS])


def scripts_of(texts: Iterable[str]) -> Counter[str]:
    """Letters by script; digits, punctuation and white space belong to none."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32)
    counts = np.bincount(np.searchsorted(STARTS, points, "right") - 1, minlength=len(SCRIPTS))
    found: Counter[str] = Counter()
    for (_, script), count in zip(SCRIPTS, counts, strict=True):
        if script and count:
            found[script] += int(count)
    return found


@dataclass
class Tally:
    """Counts that are taken while rows go by."""

    rows: int = 0  # rows read, those left out included
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    too_long: int = 0  # rows longer than seq_length
    cut: int = 0  # of these, rows that were cut
    answer_tokens_lost: int = 0  # label tokens beyond seq_length, whether the row was cut or dropped
    split: int = 0  # texts that became several rows
    masked: int = 0  # rows without a label that were left out
    lengths: Counter[int] = field(default_factory=Counter)  # tokens -> rows, before anything was cut
    scripts: Counter[str] = field(default_factory=Counter)  # script -> letters
    shortest: str = ""  # name of the shortest row
    kept: int = 0  # token rows
    conversations_split: int = 0  # that became several rows
    turns: int = 0  # of the assistant
    turn_notes: Counter[str] = field(default_factory=Counter)  # what was not learnt of them -> turns
    cut_would_keep: int = 0  # rows dropped as too long of which truncation: cut would keep a part of the answer
    cut_would_keep_tokens: int = 0  # label tokens of that part
    read_as: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> its name of a column -> ours
    unused: dict[str, Counter[str]] = field(default_factory=dict)  # file -> key without effect -> rows or messages
    placeholders: Counter[str] = field(default_factory=Counter)  # without a value, left as they are -> times

    def state(self) -> dict[str, Any]:
        """For JSON; ``of`` takes it back."""
        return dict(vars(self))

    @classmethod
    def of(cls, state: dict[str, Any]) -> Tally:
        """The tally whose ``state`` this is."""
        counters = {key: Counter(state[key]) for key in ("skipped", "scripts", "turn_notes", "placeholders")}
        lengths = Counter({int(length): count for length, count in state["lengths"].items()})
        return cls(**{**state, **counters, "lengths": lengths})

    def forget_reading(self) -> None:
        """Without what was counted before rows were tokenised: they are about to be read again."""
        self.skipped.clear()
        self.read_as.clear()
        self.unused.clear()
        self.placeholders.clear()


@dataclass(frozen=True)
class Report:
    """Counts of one dataset. Tokens and lengths are of the rows kept, percentiles of all rows that were tokenised."""

    rows: int  # rows read
    kept: int  # rows to train on
    dropped_too_long: int
    seq_length: int  # the limit that decided it, in tokens
    tokens: int
    label_tokens: int  # next-token targets among them
    longest: int  # tokens
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out before tokenising
    cut: int = 0  # rows cut at seq_length
    split: int = 0  # texts that became several rows
    masked: int = 0  # rows without a label, left out (clean.skip_faulty)
    answer_tokens_lost: int = 0  # label tokens beyond seq_length, in rows cut or dropped
    percentiles: dict[str, int] = field(default_factory=dict)  # of lengths in tokens
    duplicates: int = 0  # rows whose tokens another row has, too
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters
    conversations_split: int = 0  # conversations that became several rows, as their template shows past turns otherwise
    turns: int = 0  # of the assistant, in conversations
    turn_notes: dict[str, int] = field(default_factory=dict)  # what was not learnt of them -> turns
    cut_would_keep: int = 0  # of the rows dropped as too long, those of which truncation: cut would keep a part
    cut_would_keep_tokens: int = 0  # label tokens of these parts
    read_as: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> its name of a column -> ours
    unused: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> key without effect -> rows or messages
    placeholders: dict[str, int] = field(default_factory=dict)  # without a value, left as they are -> times
    padding: dict[str, float] = field(default_factory=dict)  # layout -> share of the slots
    layout: str = ""  # how rows share lines, once the plan has fixed it

    def lines(self) -> list[str]:
        """For people: one line of what matters, then one line for each thing that is worth a look."""
        parts = [f"data: {self.rows:,} {'row' if self.rows == 1 else 'rows'}"]
        if self.dropped_too_long:
            parts.append(f"{self.dropped_too_long:,} dropped (longer than seq_length {self.seq_length})")
        share = round(100 * self.label_tokens / max(self.tokens, 1))
        parts += [f"{self.tokens:,} tokens", f"{share}% of them learnt", f"longest {self.longest:,}"]
        layout = [self.layout] if self.layout else []
        return [", ".join(parts), *(f"  {text}" for text in (*layout, *self._remarks()))]

    def _remarks(self) -> list[str]:
        remarks = [f"left out: {count:,} rows: {reason}" for reason, count in self.skipped.items()]
        if self.cut:
            remarks.append(f"cut at seq_length {self.seq_length}: {self.cut:,} rows")
        if self.answer_tokens_lost:
            remarks.append(f"answer tokens lost beyond seq_length: {self.answer_tokens_lost:,}")
        if self.dropped_too_long:
            remarks.append(
                f"truncation: cut would keep a part of {self.cut_would_keep:,} of the rows dropped, with "
                f"{self.cut_would_keep_tokens:,} answer tokens"
            )
        if self.masked:
            remarks.append(f"left out: {self.masked:,} rows: no label")
        if self.split:
            remarks.append(f"texts split at seq_length {self.seq_length}: {self.split:,}")
        if self.duplicates:
            remarks.append(f"duplicates: {self.duplicates:,} rows have the tokens of another")
        return [*remarks, *notes_of(self)]

    def table(self) -> list[str]:
        """All counts, one a line."""
        share = self.label_tokens / max(self.tokens, 1)
        rows = [
            ("rows read", f"{self.rows:,}"),
            *((f"  left out: {reason}", f"{count:,}") for reason, count in self.skipped.items()),
            (f"  longer than seq_length {self.seq_length}, dropped", f"{self.dropped_too_long:,}"),
            (f"  longer than seq_length {self.seq_length}, cut", f"{self.cut:,}"),
            ("  of the dropped, kept in part by truncation: cut", f"{self.cut_would_keep:,}"),
            ("  without a label, left out", f"{self.masked:,}"),
            (f"  texts split at seq_length {self.seq_length}", f"{self.split:,}"),
            ("rows to train on", f"{self.kept:,}"),
            ("  duplicates among them", f"{self.duplicates:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("  of them learnt", f"{self.label_tokens:,} ({share:.1%})"),
            ("assistant turns", f"{self.turns:,}"),
            ("answer tokens lost beyond seq_length", f"{self.answer_tokens_lost:,}"),
            ("length in tokens", ", ".join(f"{key} {value:,}" for key, value in self.percentiles.items())),
            ("letters by script", ", ".join(f"{key} {value:.1%}" for key, value in self.scripts.items()) or "-"),
            *((f"padding, {kind}", f"{value:.1%} of the slots") for kind, value in self.padding.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return [*(f"{name:{width}}  {value}" for name, value in rows), *notes_of(self)]

    def as_json(self) -> dict[str, Any]:
        """What ``data_report.json`` holds."""
        return asdict(self)


def notes_of(counts: Tally | Report) -> list[str]:
    """What was done without being asked: conversations split, turns not learnt, columns renamed or without effect."""
    notes = []
    if counts.conversations_split:
        notes.append(
            f"conversations that became several rows: {counts.conversations_split:,}; their chat template shows past "
            "turns otherwise than they are written"
        )
    notes += [f"{text}: {count:,} of {counts.turns:,}" for text, count in counts.turn_notes.items()]
    if counts.placeholders:
        named = _named(counts.placeholders, "{{{{{}}}}}")
        notes.append(f"placeholders left as they are, and how often: {named}")
    for file, columns in counts.read_as.items():
        pairs = ", ".join(f'"{theirs}" is read as {ours}' for theirs, ours in columns.items())
        notes.append(f"{file}: {pairs}")
    for file, keys in counts.unused.items():
        named = _named(keys, '"{}"')
        notes.append(f"{file}: keys without effect, and how often: {named}")
    return notes


def _named(counts: Mapping[str, int], form: str) -> str:
    """The first names with their counts, and how many more there are."""
    shown = [f"{form.format(name)} ({count:,})" for name, count in list(counts.items())[:NAMED]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Shortest, median, … and longest of a histogram."""
    if not lengths:
        return {}
    values = np.array(sorted(lengths))
    below = np.cumsum([lengths[int(value)] for value in values])
    places = {f"{p}%": int(values[np.searchsorted(below, p / 100 * below[-1])]) for p in PERCENTILES}
    return {"shortest": int(values[0]), **places, "longest": int(values[-1])}


def shares(counts: Counter[str]) -> dict[str, float]:
    """Each count's share, the largest first."""
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common()}


def repeated(hashes: NDArray[np.uint64]) -> int:
    """How many of the values are there a second time."""
    return len(hashes) - len(np.unique(hashes))
