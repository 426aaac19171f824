"""``lora-ms preview``: rows as the model sees them; labelled tokens in colour, the rest grey. Without a model: as they
were read."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_ms.config import RunConfig
from lora_ms.data.example import IGNORE_INDEX, Completion, Preference, RawRow, Row, RowFault, TokenRow
from lora_ms.data.pipeline import Preparation, finish, read, tokenise
from lora_ms.data.readers import read_sources
from lora_ms.data.report import Tally, notes_of
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import CONFIG, model_config
from lora_ms.recipes import data
from lora_ms.text import counted, escaped, unescaped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 3  # shown where no row is asked for
COLOUR, GREY, PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


def run(config: RunConfig, row: int | None) -> None:
    """Prints the first rows of ``train_dataset``, or what became of one of them.

    row: its number in its file, as error lines have it: ``rows.jsonl:4`` is row 4, and so is ``rows.json[4]``.

    Raises:
        LoraMsError: there is no such row, none is kept, or there is no tokenizer.
    """
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    preparation = data.preparation_of(config, config.train_dataset, *_limits(config))
    tally = Tally()
    if tokenizer is None:
        if config.load_checkpoint:
            raise LoraMsError(
                "no tokenizer in load_checkpoint: give processor.tokenizer.vocab_file; without both, rows are shown as "
                "they were read"
            )
        show_as_read(sources, row, preparation, tally)
        return
    chunks = tokenise(read(sources, preparation, tally), tokenizer, preparation, tally)
    rows = (kept for _, chunk in chunks for kept in chunk)
    answers = 1 if preparation.preferences != "pairs" else 2  # to a row
    shown = list(islice(rows, ROWS * answers) if row is None else of_number(rows, row))
    if not shown:
        if row is None or not tally.kept:
            finish(TokenStore.of([]), preparation, tally)  # raises, with the reason
        assert row is not None
        raise LoraMsError(f"--row {row}: {why_left_out(sources, row, tokenizer, preparation)}")
    colours = sys.stdout.isatty()
    for item in shown:
        print(show(item, tokenizer, colours), end="\n\n", file=unescaped(sys.stdout))
    for note in notes(tally, preparation):
        print(note)


def show_as_read(sources: list[str], row: int | None, preparation: Preparation, tally: Tally) -> None:
    """Prints the first rows as messages, or one of them: what is there to see without a tokenizer.

    Raises:
        LoraMsError: there is no such row, or rows that cannot be read; all of these are listed.
    """
    found = list(read(sources, preparation, tally))
    shown = found[:ROWS]
    if row is not None:
        shown = [item for item in found if number_of(item) == row][:1]
        if not shown:
            raise LoraMsError(f"--row {row}: {why_left_out(sources, row, None, preparation)}")
    for item in shown:
        print(f"{item.where}:")
        for name, text in parts_of(item):
            print(f"  {name}: {text}")
        print()
    print(f"{counted(len(found), 'row')} can be read; with --load_checkpoint they are shown as the model sees them")
    for note in notes(tally, preparation):
        print(note)


def parts_of(row: Row) -> list[tuple[str, str]]:
    """Names and texts of what a row holds."""
    if isinstance(row, TokenRow):
        labels = int(np.count_nonzero(row.labels != IGNORE_INDEX))
        return [("tokens", f"{len(row.input_ids):,}, {labels:,} of them learnt")]
    if isinstance(row, Preference):
        *question, chosen = parts_of(row.chosen)
        return [*question, ("chosen", chosen[1]), ("rejected", parts_of(row.rejected)[-1][1])]
    if isinstance(row, Completion):
        return [("prompt", row.prompt), ("completion", row.completion)] if row.prompt else [("text", row.completion)]
    return [(message.role, message.content) for message in row.messages]


def why_left_out(
    sources: list[str], number: int, tokenizer: "PreTrainedTokenizerBase | None", preparation: Preparation
) -> str:
    """Why the row of that number is not among those that are kept: what becomes of it alone."""
    rows = read_sources(sources, preparation.split, preparation.num_samples)
    raw = next((row for row in rows if number_of(row) == number), None)
    if raw is None:
        return "there is no row of that number"
    if isinstance(raw.value, RowFault):
        return f"left out: {raw.value.text}"
    tally = Tally()
    tried = replace(preparation, clean=replace(preparation.clean, skip_faulty=False), num_samples=None)
    kept: list[TokenRow] = []
    try:
        alone = list(read([[raw.value]], tried, tally))
        if tokenizer is not None:
            kept = [row for _, chunk in tokenise(alone, tokenizer, tried, tally) for row in chunk]
    except LoraMsError as error:
        return f"left out: {str(error).removeprefix('row 1: ')}"
    reason = next(iter(tally.skipped), None)
    if reason is None and tally.too_long:
        reason = f"{max(tally.lengths):,} tokens, and seq_length is {preparation.seq_length:,}"
    if reason is None and kept and not any(row.learnt.size for row in kept):
        reason = "no label: nothing of it is learnt"
    return f"left out: {reason or 'its questions are those of an earlier row (clean.dedupe)'}"


def notes(tally: Tally, preparation: Preparation) -> list[str]:
    """What became of the rows that were read so far, besides those shown."""
    found = [f"left out: {count:,} rows: {reason}" for reason, count in tally.skipped.items()]
    if tally.masked:
        found.append(f"left out: {tally.masked:,} rows: no label")
    if tally.too_long:
        found.append(
            f"longer than seq_length {preparation.seq_length}: {tally.too_long:,} rows, {tally.cut:,} of them cut and "
            f"{tally.too_long - tally.cut:,} dropped"
        )
    return found + notes_of(tally)


def _limits(config: RunConfig) -> tuple[int, int | None]:
    """The model's longest text, in tokens, and the size of its vocabulary, as training has them; a model without a
    config.json has no limits here."""
    folder = Path(config.load_checkpoint)
    if not config.load_checkpoint or not (folder / CONFIG).is_file():
        return data.NO_LIMIT, None
    hf = model_config(folder)
    return hf.get("max_position_embeddings", data.NO_LIMIT), hf.get("vocab_size")


def of_number(rows: Iterable[TokenRow], number: int) -> Iterator[TokenRow]:
    """What the first row of that number became; no row after it is read."""
    where = None
    for row in rows:
        if where is None and number_of(row) == number:
            where = row.where
        if where is not None:
            if row.where != where:
                return
            yield row


def number_of(row: Row | RawRow) -> int:
    """The number at the end of ``where``: of a line, or of an element of a list."""
    found = re.search(r"(\d+)\D*$", row.where)
    return int(found[1]) if found else 0


def show(row: TokenRow, tokenizer, colours: bool) -> str:
    """A heading, and the text of a row: labelled parts in colour, or, without colours, in double brackets."""
    learnt = row.labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1  # where labelled parts begin and end
    labels = int(np.count_nonzero(learnt[1:]))
    what = "learnt" if row.liked else "rejected"
    head = f"{row.where}: {counted(len(row.input_ids), 'token')}, {labels:,} of them {what}"
    parts = []
    for part in np.split(np.arange(len(learnt)), edges):
        text = escaped(tokenizer.decode(row.input_ids[part], clean_up_tokenization_spaces=False))
        if colours:
            parts.append(f"{COLOUR if learnt[part[0]] else GREY}{text}{PLAIN}")
        else:
            parts.append(f"[[{text}]]" if learnt[part[0]] else text)
    return f"{head}\n{''.join(parts)}"
