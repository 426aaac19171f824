"""From rows to a store of tokens: cleaned, tokenised, cut or dropped, checked and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal
from zlib import adler32, crc32

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.clean import Clean, Cleaner
from lora_ms.data.example import IGNORE_INDEX, Completion, Example, TokenRow
from lora_ms.data.formats import Reading, Row
from lora_ms.data.readers import iter_rows
from lora_ms.data.report import Report, Tally, percentiles, repeated, scripts_of, shares
from lora_ms.data.store import TokenStore
from lora_ms.data.template import encode_rows
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_NAMED = 5
ROWS_TOGETHER = 256  # tokenised in one call


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens."""

    seq_length: int  # tokens of the longest row kept
    vocab_size: int | None = None  # ids must be below it; None: not checked
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # our name of a column -> the file's
    fill: Mapping[str, str] = field(default_factory=dict)  # what stands for {{KEY}} in every text
    split: str = "train"  # of a Hugging Face dataset
    num_samples: int | None = None  # only the first rows
    turns: Literal["all", "last"] = "all"  # assistant turns that carry labels
    truncation: Literal["error", "drop", "cut"] = "drop"  # what is done with rows longer than seq_length
    clean: Clean = Clean()


Source = str | PathLike[str] | Sequence[Mapping[str, Any]]


def read(sources: Sequence[Source], how: Preparation, tally: Tally) -> Iterator[Row]:
    """The rows of all sources, cleaned; `tally` counts those left out."""
    cleaner = Cleaner(how.clean, tally.skipped)
    reading = Reading(
        how.format,
        how.columns,
        how.fill,
        cleaner.accept if how.clean.required else None,
        cleaner.keep if how.clean != Clean() else None,
        cleaner.fault if how.clean.skip_faulty else None,
    )
    return iter_rows(sources, reading, how.num_samples, how.split)


def prepare_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase | None, how: Preparation, tally: Tally | None = None
) -> tuple[TokenStore, Report]:
    """Tokenise the text rows, drop or cut rows longer than seq_length, and check that every row teaches something.

    A row that came as tokens may have seq_length + 1 of them, as MindFormers' datasets do: its last is a target only.
    tokenizer: may be None when all rows are TokenRows.

    Raises LoraMsError, naming rows, when nothing remains, when a row has no label, or when an id is out of range.
    """
    tally = tally or Tally()
    store = TokenStore.of(row for _, chunk in tokenise(rows, tokenizer, how, tally) for row in chunk)
    return store, finish(store, how, tally)


def tokenise(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase | None, how: Preparation, tally: Tally
) -> Iterator[tuple[int, list[TokenRow]]]:
    """Some hundred rows at a time as tokens, each time with the number of rows taken from `rows` so far."""
    rows, taken = iter(rows), 0
    while chunk := list(islice(rows, ROWS_TOGETHER)):
        taken += len(chunk)
        texts = [row for row in chunk if not isinstance(row, TokenRow)]
        if texts and tokenizer is None:
            raise LoraMsError(
                f"{texts[0].where}: a text row needs a tokenizer; give one, or rows of input_ids and labels"
            )
        encoded = iter(encode_rows(tokenizer, texts, how.turns) if tokenizer is not None else [])
        tally.rows += len(chunk)
        tally.scripts += scripts_of(_letters(texts))
        kept = []
        for row in chunk:
            tokens = row if isinstance(row, TokenRow) else next(encoded)
            if how.vocab_size is not None:
                _check_vocabulary(tokens, how.vocab_size)
            kept += _within(row, tokens, how, tally)
        yield taken, kept


def _letters(rows: Iterable[Example | Completion]) -> Iterator[str]:
    for row in rows:
        if isinstance(row, Completion):
            yield from (row.prompt, row.completion)
        else:
            yield from (message.content for message in row.messages)


def _within(row: Row, tokens: TokenRow, how: Preparation, tally: Tally) -> list[TokenRow]:
    """The row, or what becomes of it where it is too long."""
    length, limit = len(tokens.input_ids), how.seq_length + isinstance(row, TokenRow)
    if length < min(tally.lengths, default=length + 1):
        tally.shortest = tokens.where
    tally.lengths[length] += 1
    if how.clean.skip_faulty and not np.count_nonzero(tokens.labels[1:] != IGNORE_INDEX):
        tally.masked += 1
        return []
    if length <= limit:
        return [tokens]
    if isinstance(row, Completion) and not row.prompt:
        tally.split += 1
        return _pieces(tokens, how.seq_length)
    tally.too_long += 1
    lost = int(np.count_nonzero(tokens.labels[limit:] != IGNORE_INDEX))
    if how.truncation == "error":
        raise LoraMsError(
            f"{tokens.where}: {length} tokens, and seq_length is {how.seq_length}; raise it, or set truncation to "
            "drop or cut"
        )
    cut = _cut(tokens, limit) if how.truncation == "cut" else None
    tally.cut += cut is not None
    tally.answer_tokens_lost += lost if cut is not None else int(np.count_nonzero(tokens.labels != IGNORE_INDEX))
    return [] if cut is None else [cut]


def _cut(row: TokenRow, limit: int) -> TokenRow | None:
    """The first tokens of a row and the end of its answer; None where nothing of the answer would remain."""
    end = np.flatnonzero(row.labels != IGNORE_INDEX)[-1:]
    keep = np.concatenate([np.arange(limit - len(end)), end])
    labels = row.labels[keep]
    if np.count_nonzero(labels[1:] != IGNORE_INDEX) < 2:
        return None
    return TokenRow(row.where, row.input_ids[keep], labels)


def _pieces(row: TokenRow, limit: int) -> list[TokenRow]:
    """A text in rows of `limit` tokens. Each begins with the last token of the one before, so that all are learnt."""
    pieces = []
    for start in range(0, len(row.input_ids) - 1, limit - 1):
        labels = row.labels[start : start + limit].copy()
        labels[0] = IGNORE_INDEX
        pieces.append(TokenRow(row.where, row.input_ids[start : start + limit], labels))
    return pieces


def _check_vocabulary(row: TokenRow, vocab_size: int) -> None:
    largest = int(max(row.input_ids.max(), row.labels.max()))
    if largest >= vocab_size:
        raise LoraMsError(
            f"{row.where}: token id {largest} does not exist in a vocabulary of {vocab_size}; "
            "is the tokenizer, or the tokenised data, another model's?"
        )


def finish(store: TokenStore, how: Preparation, tally: Tally) -> Report:
    """The report; raises LoraMsError where nothing remains or a row teaches nothing."""
    left_out = tally.skipped.total()
    if not tally.rows:
        raise LoraMsError(f"the dataset: there are no rows{' left' if left_out else ''}; give at least one")
    if not len(store) and tally.masked:
        raise LoraMsError(f"no row has a label, so nothing can be learnt: {tally.masked} rows left out")
    if not len(store):
        shortest = min(tally.lengths)
        subject = "the only row is" if tally.rows == 1 else f"all {tally.rows} rows are"
        raise LoraMsError(
            f"{subject} longer than seq_length {how.seq_length} (shortest: {shortest} tokens, {tally.shortest}); "
            "raise seq_length"
        )
    _check_labels(store)
    return Report(
        rows=tally.rows + left_out,
        kept=len(store),
        dropped_too_long=tally.too_long - tally.cut,
        seq_length=how.seq_length,
        tokens=int(store.lengths.sum()),
        label_tokens=int(store.label_counts.sum()),
        longest=int(store.lengths.max()),
        skipped=dict(tally.skipped),
        cut=tally.cut,
        split=tally.split,
        masked=tally.masked,
        answer_tokens_lost=tally.answer_tokens_lost,
        percentiles=percentiles(tally.lengths),
        duplicates=repeated(_hashes(store)),
        scripts=shares(tally.scripts),
    )


def check_vocabulary(store: TokenStore, vocab_size: int) -> None:
    """Raises LoraMsError where a token id is not below `vocab_size`, naming the first such row."""
    for first, last in store.chunks():
        start = int(store.columns.ends[first - 1]) if first else 0
        if store.columns.ids[start : int(store.columns.ends[last - 1])].max(initial=0) >= vocab_size:
            for index in range(first, last):
                _check_vocabulary(store[index], vocab_size)
        store.release()


def _check_labels(store: TokenStore) -> None:
    silent = np.flatnonzero(store.label_counts == 0)
    named = [store.where(int(index)) for index in silent[:ROWS_NAMED]]
    if len(silent) == len(store):
        raise LoraMsError(
            f"no row has a label, so nothing can be learnt (first: {named[0]}); check labels or prompt_len"
        )
    if len(silent):
        more = f" and {len(silent) - ROWS_NAMED} more" if len(silent) > ROWS_NAMED else ""
        raise LoraMsError(
            f"{len(silent)} of {len(store)} rows have no label: {', '.join(named)}{more}; "
            "check their labels or prompt_len, or remove them"
        )


def _hashes(store: TokenStore) -> NDArray[np.uint64]:
    hashes = np.empty(len(store), np.uint64)
    for first, last in store.chunks():
        for index in range(first, last):
            raw = store[index].input_ids.tobytes()
            hashes[index] = crc32(raw) << 32 | adler32(raw)
        store.release()
    return hashes
