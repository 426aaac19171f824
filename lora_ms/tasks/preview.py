"""``lora-ms preview``: rows as the model sees them; labelled tokens in colour, the rest grey."""

import sys
from itertools import islice

import numpy as np

from lora_ms.config import RunConfig
from lora_ms.data.example import IGNORE_INDEX, TokenRow
from lora_ms.data.pipeline import read, tokenise
from lora_ms.data.report import Tally
from lora_ms.errors import LoraMsError
from lora_ms.tasks import data

ROWS = 3  # shown where no row is asked for
COLOUR, GREY, PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


def run(config: RunConfig, row: int | None) -> None:
    """Prints the first rows of ``train_dataset``, or row ``row`` (from 1) of those that are kept.

    Raises:
        LoraMsError: there is no such row, or no tokenizer.
    """
    if row is not None and row < 1:
        raise LoraMsError(f"--row {row}: rows are counted from 1")
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    if tokenizer is None:
        raise LoraMsError("no tokenizer: give --load_checkpoint, or processor.tokenizer.vocab_file")
    how = data.preparation(config, config.train_dataset, data.NO_LIMIT, None)
    tally = Tally()
    rows = (kept for _, chunk in tokenise(read(sources, how, tally), tokenizer, how, tally) for kept in chunk)
    first = 0 if row is None else row - 1
    shown = list(islice(rows, first, first + (ROWS if row is None else 1)))
    if not shown:
        raise LoraMsError(f"--row {row}: there are {len(tally.lengths) and tally.rows:,} rows")
    colours = sys.stdout.isatty()
    for item in shown:
        print(show(item, tokenizer, colours), end="\n\n")


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
