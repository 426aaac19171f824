"""From files to a store of tokens: rows are read, parsed, cleaned, tokenised, cut or dropped, checked and counted.

The stages are generators over the rows, one after another: `read` and `tokenise` are their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import adler32, crc32

import numpy as np
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.data import cache
from lora_ms.data.clean import Cleaner, CleaningRules
from lora_ms.data.example import IGNORE_INDEX, Completion, Example, Row, TokenRow
from lora_ms.data.formats import ParserNotes, Placeholders, parse_rows, rename_columns
from lora_ms.data.preferences import Preferences, texts_of
from lora_ms.data.readers import RowSource, find_files, read_sources
from lora_ms.data.report import Report, Tally, percentiles, repeated, scripts_of, shares
from lora_ms.data.store import StoreWriter, TokenStore
from lora_ms.data.template import Encoded, encode_rows
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_NAMED = 5
ROWS_TOGETHER = 256  # tokenised in one call
SMALL = 64 << 20  # bytes of files that are tokenised in memory, without a cache
SAVE_EVERY = 20_000  # rows
STATE, REPORT = "state.json", "report.json"


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens."""

    seq_length: int  # tokens of the longest row kept
    vocab_size: int | None = None  # ids must be below it; None: not checked
    format: str = "auto"  # or a key of formats.PARSERS
    columns: Mapping[str, str] = field(default_factory=dict)  # our name of a column -> the file's
    fill: Mapping[str, str] = field(default_factory=dict)  # what stands for {{KEY}} in every text
    keep_placeholders: bool = False  # leave a {{KEY}} that `fill` does not have as it is; False: it is an error
    split: str | None = "train"  # of a folder or a saved dataset that has several; see ``readers.read_sources``
    num_samples: int | None = None  # only the first rows
    turns: Literal["all", "last"] = "all"  # assistant turns that carry labels
    truncation: Literal["error", "drop", "cut"] = "drop"  # what is done with rows longer than seq_length
    clean: CleaningRules = CleaningRules()
    preferences: Preferences = "none"  # whether rows have two answers, or one with a label, and not one to learn


def prepare(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    preparation: Preparation,
    *,
    always_cache: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[TokenStore, Report]:
    """The rows of `sources` as tokens: from the cache, or into it where the files are large or `always_cache` is set.

    say: told of progress.
    """
    files = [file for source in sources for file in _all_files(source, preparation.split)]
    if not always_cache and sum(file.stat().st_size for file in files) < SMALL:
        tally = Tally()
        return prepare_rows(read(sources, preparation, tally), tokenizer, preparation, tally)
    # The tokens are the same for models of all vocabulary sizes, which are checked below.
    vocab_size = preparation.vocab_size
    preparation = replace(preparation, vocab_size=None)
    folder = cache.folder_of(files, tokenizer, asdict(preparation))
    with cache.locked(folder):
        found = _kept(folder, say)
        if found is None:
            _build(folder, sources, tokenizer, preparation, say)
            found = _load(folder)
    store, report = found
    if vocab_size is not None:
        check_vocabulary(store, vocab_size)
    return store, report


def _load(folder: Path) -> tuple[TokenStore, Report]:
    return TokenStore.load(folder), Report(**storage.read_json(folder / REPORT))


def _kept(folder: Path, say: Callable[[str], None]) -> tuple[TokenStore, Report] | None:
    """What was kept in `folder`, every file as it was written; None where that is nothing."""
    if not (folder / saving.MARKER).exists():
        return None
    if saving.is_intact(folder):
        with suppress(OSError, TypeError, ValueError, LoraMsError):  # files of another version of this program
            return _load(folder)
    say(f"the tokens kept in {folder} are damaged: tokenising the rows again")
    for name in saving.files_of(folder):
        (folder / name).unlink()
    return None


def _all_files(source: str, split: str | None) -> list[Path]:
    found = find_files(source, split)
    return [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def _build(
    folder: Path,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    preparation: Preparation,
    say: Callable[[str], None],
) -> None:
    """Tokenises into `folder`; a build that was killed goes on from the last state that it wrote."""
    with closing(_Begun(folder)) as begun:
        rows = read(sources, preparation, begun.tally)
        if begun.taken:
            say(f"going on after {begun.taken:,} rows that were tokenised before")
            next(islice(rows, begun.taken - 1, None), None)
        saved = 0
        for taken, token_rows in tokenise(rows, tokenizer, preparation, begun.tally):
            for row in token_rows:
                begun.writer.add(row)
            if taken - saved >= SAVE_EVERY:
                saved = taken
                begun.save(begun.taken + taken)
                say(f"{begun.taken + taken:,} rows tokenised")
    store = TokenStore.load(folder)
    storage.write_json(folder / REPORT, finish(store, preparation, begun.tally).as_json())
    (folder / STATE).unlink(missing_ok=True)
    saving.seal(folder)


class _Begun:
    """A build of tokens: where an earlier start of it stopped, or its beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken = 0  # rows that were read before
        self.tally = Tally()
        try:
            state = storage.read_json(folder / STATE) if (folder / STATE).is_file() else {}
            if state and state.pop("sha256") != _digest(state):
                raise ValueError("damaged")
            self.writer = StoreWriter(folder, **state.get("written", {}))
            if state:
                self.tally = Tally.of(state["tally"])
                self.taken = state["taken"]
        except (LoraMsError, KeyError, TypeError, ValueError):  # damaged: from the beginning, then
            self.writer = StoreWriter(folder)
        self.tally.forget_reading()

    def save(self, taken: int) -> None:
        """Writes where the build is, after ``taken`` rows."""
        state = {"written": self.writer.flush(), "taken": taken, "tally": self.tally.state()}
        state = json.loads(json.dumps(state))  # its keys as they are read
        storage.write_json(self.folder / STATE, {**state, "sha256": _digest(state)})

    def close(self) -> None:
        """No more rows."""
        self.writer.close()


def _digest(state: Mapping[str, Any]) -> str:
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def prepare_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    preparation: Preparation,
    tally: Tally | None = None,
) -> tuple[TokenStore, Report]:
    """Tokenise the text rows, drop or cut rows longer than seq_length, and check that every row teaches something.

    A row that came as tokens may have seq_length + 1 of them, as MindFormers' datasets do: its last is a target only.
    tokenizer: may be None when all rows are TokenRows.

    Raises LoraMsError, naming rows, when nothing remains, when a row has no label, or when an id is out of range.
    """
    tally = tally or Tally()
    chunks = tokenise(rows, tokenizer, preparation, tally)
    store = TokenStore.of(row for _, chunk in chunks for row in chunk)
    return store, finish(store, preparation, tally)


def read_rows(
    source: RowSource,
    *,
    fill: Mapping[str, str] | None = None,
    keep_placeholders: bool = False,
    num_samples: int | None = None,
) -> list[Row]:
    """The rows of one source as a list.

    source: a file, a folder (its supported files, sorted by name), a glob, or a sequence of dicts.
    fill: what stands for {{KEY}} in every string of a text row. A {{KEY}} that is not filled is an error, or, with
        `keep_placeholders`, stays as it is.
    num_samples: only the first rows; None: all.

    Raises LoraMsError, with the file and line, for whatever cannot be read or learnt from.
    """
    placeholders = Placeholders(fill or {}, keep_placeholders)
    return list(parse_rows(read_sources([source], num_samples=num_samples), placeholders=placeholders))


def read(sources: Sequence[RowSource], preparation: Preparation, tally: Tally) -> Iterator[Row]:
    """The rows of all sources, parsed and cleaned; `tally` counts those left out.

    Raises LoraMsError, with the file and line, for whatever cannot be read or learnt from.
    """
    rules = preparation.clean
    cleaner = Cleaner(rules, tally.skipped)
    raw_rows = read_sources(sources, preparation.split, preparation.num_samples)
    raw_rows = rename_columns(raw_rows, preparation.columns)
    raw_rows = cleaner.with_required(raw_rows)
    on_fault = cleaner.count_fault if rules.skip_faulty else None
    rows = parse_rows(
        raw_rows,
        format=preparation.format,
        placeholders=Placeholders(preparation.fill, preparation.keep_placeholders, tally.placeholders),
        notes=ParserNotes(read_as=tally.read_as, unused=tally.unused, left_out=tally.skipped),
        on_fault=on_fault,
        preferences=preparation.preferences,
    )
    return cleaner.cleaned(rows)


def tokenise(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase | None, preparation: Preparation, tally: Tally
) -> Iterator[tuple[int, list[TokenRow]]]:
    """Some hundred rows at a time as tokens, each time with the number of rows taken from `rows` so far."""
    rows = iter(rows)
    taken = 0
    while chunk := list(islice(rows, ROWS_TOGETHER)):
        taken += len(chunk)
        texts = [text for row in chunk for text in texts_of(row)]
        if texts and tokenizer is None:
            raise LoraMsError(
                f"{texts[0].where}: a text row needs a tokenizer; give one, or rows of input_ids and labels"
            )
        turns = preparation.turns if preparation.preferences == "none" else "last"
        encoded = iter(encode_rows(tokenizer, texts, turns) if tokenizer is not None else [])
        tally.rows += len(chunk)
        tally.scripts += scripts_of(_letters(texts))
        kept = []
        for row in chunk:
            token_rows = [row] if isinstance(row, TokenRow) else []
            for _ in texts_of(row):
                token_rows += _counted(next(encoded), tally)
            within: list[TokenRow] = []
            for tokens in token_rows:
                if preparation.vocab_size is not None:
                    _check_vocabulary(tokens, preparation.vocab_size)
                within += _within_limit(row, tokens, preparation, tally)
            if preparation.preferences == "none" or len(within) == len(token_rows):  # both answers, or none
                kept += within
        tally.kept += len(kept)
        yield taken, kept


def _counted(encoded: Encoded, tally: Tally) -> list[TokenRow]:
    """The token rows of a text or conversation, its turns counted."""
    tally.turns += encoded.turns
    tally.turn_notes += encoded.notes
    tally.conversations_split += len(encoded.rows) > 1
    return encoded.rows


def _letters(rows: Iterable[Example | Completion]) -> Iterator[str]:
    for row in rows:
        if isinstance(row, Completion):
            yield row.prompt
            yield row.completion
        else:
            yield from (message.content for message in row.messages)


def _within_limit(row: Row, tokens: TokenRow, preparation: Preparation, tally: Tally) -> list[TokenRow]:
    """The row, or what becomes of it where it is too long."""
    length = len(tokens.input_ids)
    limit = preparation.seq_length + isinstance(row, TokenRow)
    if length < min(tally.lengths, default=length + 1):
        tally.shortest = tokens.where
    tally.lengths[length] += 1
    if preparation.clean.skip_faulty and not tokens.learnt.size:
        tally.masked += 1
        return []
    if length <= limit:
        return [tokens]
    if isinstance(row, Completion) and not row.prompt and preparation.preferences == "none":
        tally.split += 1
        return _pieces(tokens, preparation.seq_length)
    tally.too_long += 1
    if preparation.truncation == "error":
        raise LoraMsError(
            f"{tokens.where}: {length} tokens, and seq_length is {preparation.seq_length}; raise it, or set "
            "truncation to drop or cut"
        )
    cut = _cut(tokens, limit)
    if cut is None or preparation.truncation == "drop":
        tally.answer_tokens_lost += int(np.count_nonzero(tokens.labels != IGNORE_INDEX))
        tally.cut_would_keep += cut is not None
        tally.cut_would_keep_tokens += 0 if cut is None else len(cut.learnt)
        return []
    tally.cut += 1
    tally.answer_tokens_lost += int(np.count_nonzero(tokens.labels[limit:] != IGNORE_INDEX))
    return [cut]


def _cut(row: TokenRow, limit: int) -> TokenRow | None:
    """The first tokens of a row and the end of its answer; None where nothing of the answer would remain."""
    end = np.flatnonzero(row.labels != IGNORE_INDEX)[-1:]
    keep = np.arange(limit) if not end.size or end[0] < limit else np.concatenate([np.arange(limit - len(end)), end])
    cut = TokenRow(row.where, row.input_ids[keep], row.labels[keep], row.liked)
    return cut if len(cut.learnt) >= 2 else None


def _pieces(row: TokenRow, limit: int) -> list[TokenRow]:
    """A text in rows of `limit` tokens. Each begins with the last token of the one before, so that all are learnt."""
    pieces = []
    for start in range(0, len(row.input_ids) - 1, limit - 1):
        labels = row.labels[start : start + limit].copy()
        labels[0] = IGNORE_INDEX
        pieces.append(TokenRow(row.where, row.input_ids[start : start + limit], labels))
    return pieces


def finish(store: TokenStore, preparation: Preparation, tally: Tally) -> Report:
    """The report; raises LoraMsError where nothing remains or a row teaches nothing."""
    left_out = tally.skipped.total()
    if not tally.rows:
        reasons = ", ".join(f"{count:,}: {reason}" for reason, count in tally.skipped.items())
        left = f" left (left out: {reasons})" if left_out else ""
        raise LoraMsError(f"the dataset: there are no rows{left}; give at least one")
    if not len(store) and tally.masked:
        raise LoraMsError(f"no row has a label, so nothing can be learnt: {tally.masked} rows left out")
    if not len(store):
        shortest = min(tally.lengths)
        subject = "the only row is" if tally.rows == 1 else f"all {tally.rows} rows are"
        raise LoraMsError(
            f"{subject} longer than seq_length {preparation.seq_length} (shortest: {shortest} tokens, "
            f"{tally.shortest}); raise seq_length"
        )
    _check_labels(store)
    return Report(
        rows=tally.rows + left_out,
        kept=len(store),
        dropped_too_long=tally.too_long - tally.cut,
        seq_length=preparation.seq_length,
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
        conversations_split=tally.conversations_split,
        turns=tally.turns,
        turn_notes=dict(tally.turn_notes),
        cut_would_keep=tally.cut_would_keep,
        cut_would_keep_tokens=tally.cut_would_keep_tokens,
        read_as=tally.read_as,
        unused={file: dict(counts) for file, counts in tally.unused.items()},
        placeholders=dict(tally.placeholders),
    )


def check_vocabulary(store: TokenStore, vocab_size: int) -> None:
    """Raises LoraMsError where a token id is not below `vocab_size`, naming the first such row."""
    for first, last in store.chunks():
        start = int(store.columns.ends[first - 1]) if first else 0
        tokens = slice(start, int(store.columns.ends[last - 1]))
        if max(part[tokens].max(initial=0) for part in (store.columns.ids, store.columns.labels)) >= vocab_size:
            for index in range(first, last):
                _check_vocabulary(store[index], vocab_size)
        store.release()


def _check_vocabulary(row: TokenRow, vocab_size: int) -> None:
    largest = int(max(row.input_ids.max(), row.labels.max()))
    if largest >= vocab_size:
        raise LoraMsError(
            f"{row.where}: token id {largest} does not exist in a vocabulary of {vocab_size}; "
            "is the tokenizer, or the tokenised data, another model's?"
        )


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
