"""``lora-ms preview``: rows as the model sees them; labelled tokens in colour, the rest grey."""

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.config import RunConfig
from lora_ms.data.example import IGNORE_INDEX, TokenRow
from lora_ms.data.pipeline import finish, read, tokenise
from lora_ms.data.report import Tally
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.recipes import data

ROWS = 3  # shown where no row is asked for
COLOUR, GREY, PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


def run(config: RunConfig, row: int | None) -> None:
    """Prints the first rows of ``train_dataset``, or what became of the row of that number in its file.

    row: as error lines name it: ``rows.jsonl:4`` is row 4, and so is ``rows.json[4]``.

    Raises:
        LoraMsError: there is no such row, none is kept, or there is no tokenizer.
    """
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    if tokenizer is None:
        raise LoraMsError("no tokenizer: give --load_checkpoint, or processor.tokenizer.vocab_file")
    preparation = data.preparation(config, config.train_dataset, data.NO_LIMIT, _vocab_size(config))
    tally = Tally()
    chunks = tokenise(read(sources, preparation, tally), tokenizer, preparation, tally)
    rows = (kept for _, chunk in chunks for kept in chunk)
    shown = list(islice(rows if row is None else of_number(rows, row), ROWS))
    if not shown:
        if row is None or tally.rows == tally.too_long - tally.cut + tally.masked:
            finish(TokenStore.of([]), preparation, tally)  # says why
        raise LoraMsError(f"--row {row}: not among the rows that are kept, of {tally.rows:,} that were read")
    colours = sys.stdout.isatty()
    for item in shown:
        print(show(item, tokenizer, colours), end="\n\n")


def _vocab_size(config: RunConfig) -> int | None:
    file = Path(config.load_checkpoint) / "config.json"
    return storage.read_json(file).get("vocab_size") if config.load_checkpoint and file.is_file() else None


def of_number(rows: Iterable[TokenRow], number: int) -> Iterator[TokenRow]:
    """What the first row of that number became; no row behind it is read."""
    where = None
    for row in rows:
        if where is None and number_of(row) == number:
            where = row.where
        if where is not None:
            if row.where != where:
                return
            yield row


def number_of(row: TokenRow) -> int:
    """The number of its line, or of its place in a list, that ends ``where``."""
    found = re.search(r"(\d+)\D*$", row.where)
    return int(found[1]) if found else 0


def show(row: TokenRow, tokenizer, colours: bool) -> str:
    """A heading, and the text of a row: labelled runs in colour, or, without colours, in double brackets."""
    learnt = row.labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1
    head = f"{row.where}: {len(row.input_ids)} tokens, {int(np.count_nonzero(learnt[1:]))} of them labels"
    parts = []
    for part in np.split(np.arange(len(learnt)), edges):
        text = tokenizer.decode(row.input_ids[part], clean_up_tokenization_spaces=False)
        if colours:
            parts.append(f"{COLOUR if learnt[part[0]] else GREY}{text}{PLAIN}")
        else:
            parts.append(f"[[{text}]]" if learnt[part[0]] else text)
    return f"{head}\n{''.join(parts)}"
