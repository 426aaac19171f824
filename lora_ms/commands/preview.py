"""``lora-ms preview``: rows as the model sees them; labelled tokens in colour, the rest grey."""

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from lora_ms.config import RunConfig
from lora_ms.data.example import IGNORE_INDEX, TokenRow
from lora_ms.data.pipeline import Preparation, finish, read, tokenise
from lora_ms.data.report import Tally, notes_of
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import CONFIG, model_config
from lora_ms.recipes import data
from lora_ms.text import counted, escaped, unescaped

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
    if tokenizer is None:
        raise LoraMsError("no tokenizer: give --load_checkpoint, or processor.tokenizer.vocab_file")
    preparation = data.preparation_of(config, config.train_dataset, *_limits(config))
    tally = Tally()
    chunks = tokenise(read(sources, preparation, tally), tokenizer, preparation, tally)
    rows = (kept for _, chunk in chunks for kept in chunk)
    shown = list(islice(rows, ROWS) if row is None else of_number(rows, row))
    if not shown:
        if row is None or not tally.kept:
            finish(TokenStore.of([]), preparation, tally)  # raises, with the reason
        raise LoraMsError(f"--row {row}: not among the rows that are kept, of {tally.rows:,} that were read")
    colours = sys.stdout.isatty()
    for item in shown:
        print(show(item, tokenizer, colours), end="\n\n", file=unescaped(sys.stdout))
    for note in notes(tally, preparation):
        print(note)


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


def number_of(row: TokenRow) -> int:
    """The number at the end of ``where``: of a line, or of an element of a list."""
    found = re.search(r"(\d+)\D*$", row.where)
    return int(found[1]) if found else 0


def show(row: TokenRow, tokenizer, colours: bool) -> str:
    """A heading, and the text of a row: labelled parts in colour, or, without colours, in double brackets."""
    learnt = row.labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1  # where labelled parts begin and end
    labels = int(np.count_nonzero(learnt[1:]))
    head = f"{row.where}: {counted(len(row.input_ids), 'token')}, {labels:,} of them labels"
    parts = []
    for part in np.split(np.arange(len(learnt)), edges):
        text = escaped(tokenizer.decode(row.input_ids[part], clean_up_tokenization_spaces=False))
        if colours:
            parts.append(f"{COLOUR if learnt[part[0]] else GREY}{text}{PLAIN}")
        else:
            parts.append(f"[[{text}]]" if learnt[part[0]] else text)
    return f"{head}\n{''.join(parts)}"
