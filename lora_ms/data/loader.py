"""From rows to the plan of a whole run: which rows each optimiser step takes, in which shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.collate import collate, label_count
from lora_ms.data.example import Batch, Example, TokenRow
from lora_ms.data.report import Report
from lora_ms.data.template import encode
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_NAMED = 5


def prepare_rows(
    rows: Sequence[Example | TokenRow],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_length: int,
    vocab_size: int | None = None,
) -> tuple[list[TokenRow], Report]:
    """Tokenise the text rows, drop rows longer than `seq_length` tokens, and check that every row teaches something.

    A row that came as tokens may have seq_length + 1 of them, as MindFormers' datasets do: its last is a target only.
    tokenizer: may be None when all rows are TokenRows.
    vocab_size: ids must be below it; None: not checked.

    Raises LoraMsError, naming rows, when nothing remains, when a row has no label, or when an id is out of range.
    """
    kept: list[TokenRow] = []
    shortest: TokenRow | None = None
    for row in rows:
        if isinstance(row, TokenRow):
            encoded, limit = row, seq_length + 1
        elif tokenizer is None:
            raise LoraMsError(f"{row.where}: a text row needs a tokenizer; give one, or rows of input_ids and labels")
        else:
            encoded, limit = encode(tokenizer, row), seq_length
        if vocab_size is not None:
            _check_vocabulary(encoded, vocab_size)
        if shortest is None or len(encoded.input_ids) < len(shortest.input_ids):
            shortest = encoded
        if len(encoded.input_ids) <= limit:
            kept.append(encoded)
    if shortest is None:
        raise LoraMsError("the dataset: there are no rows; give at least one")
    if not kept:
        subject = "the only row is" if len(rows) == 1 else f"all {len(rows)} rows are"
        raise LoraMsError(
            f"{subject} longer than seq_length {seq_length} "
            f"(shortest: {len(shortest.input_ids)} tokens, {shortest.where}); raise seq_length"
        )
    counts = [label_count(row) for row in kept]
    _check_labels(kept, counts)
    lengths = [len(row.input_ids) for row in kept]
    report = Report(len(rows), len(kept), len(rows) - len(kept), seq_length, sum(lengths), sum(counts), max(lengths))
    return kept, report


def _check_vocabulary(row: TokenRow, vocab_size: int) -> None:
    largest = int(max(row.input_ids.max(), row.labels.max()))
    if largest >= vocab_size:
        raise LoraMsError(
            f"{row.where}: token id {largest} does not exist in a vocabulary of {vocab_size}; "
            "is the tokenizer, or the tokenised data, another model's?"
        )


def _check_labels(rows: list[TokenRow], counts: list[int]) -> None:
    silent = [row.where for row, count in zip(rows, counts, strict=True) if count == 0]
    if len(silent) == len(rows):
        raise LoraMsError(
            f"no row has a label, so nothing can be learnt (first: {silent[0]}); check labels or prompt_len"
        )
    if silent:
        more = f" and {len(silent) - ROWS_NAMED} more" if len(silent) > ROWS_NAMED else ""
        raise LoraMsError(
            f"{len(silent)} of {len(rows)} rows have no label: {', '.join(silent[:ROWS_NAMED])}{more}; "
            "check their labels or prompt_len, or remove them"
        )


def round_up(value: int, fine: int, coarse: int, above: int) -> int:
    """The multiple of `fine` (beyond `above`: of `coarse`) next above `value`. Few shapes, few compilations."""
    unit = coarse if value > above else fine
    return -(-value // unit) * unit


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.flags.writeable = False  # shared by all callers
    return order


@dataclass(frozen=True, eq=False)
class DataPlan:
    """The rows of every optimiser step of a run, as a function of the step: any step can be asked for at any time.

    A step takes the next batch_size * accumulation * world rows of the epoch's order, so that layouts with the same
    product (8x1, 4x2, two ranks of 4) take the same rows in the same step. The last step of an epoch may be short:
    rows that are all padding, without labels, fill it up.
    """

    rows: Sequence[TokenRow]
    batch_size: int  # rows of one micro-batch on one rank
    accumulation: int  # micro-batches of one rank in a step
    seed: int
    shuffle: bool
    rank: int
    world: int  # ranks
    pad_id: int
    steps_per_epoch: int
    total_steps: int  # optimiser steps of the run
    padded_length: int  # tokens of every row in a batch
    capacity: int  # target slots of every micro-batch
    label_counts: NDArray[np.int64]  # [rows]

    @classmethod
    def build(
        cls,
        rows: Sequence[TokenRow],
        *,
        batch_size: int,
        accumulation: int,
        epochs: int,
        seed: int,
        shuffle: bool = True,
        drop_remainder: bool = False,
        rank: int = 0,
        world: int = 1,
        pad_id: int,
        seq_length: int,
        max_steps: int = -1,
    ) -> DataPlan:
        """Fix the run's steps and shapes.

        drop_remainder: leave out the last, short step of each epoch.
        seq_length: longest row, in tokens; rows are padded to the longest one there is, at most to this.
        max_steps: number of optimiser steps, whatever `epochs` says; -1: all of `epochs`.

        Raises LoraMsError when drop_remainder leaves no step.
        """
        per_step = batch_size * accumulation * world
        steps_per_epoch = len(rows) // per_step if drop_remainder else -(-len(rows) // per_step)
        if steps_per_epoch == 0:
            raise LoraMsError(
                f"drop_remainder leaves nothing to train on: {len(rows)} rows, but a step takes {per_step} "
                f"(batch_size {batch_size} x accumulation {accumulation} x ranks {world}); "
                "set drop_remainder: False or lower batch_size"
            )
        total_steps = max_steps if max_steps > 0 else steps_per_epoch * epochs
        longest = max(len(row.input_ids) for row in rows)
        padded_length = min(round_up(longest, 16, 64, above=512), seq_length)
        counts = np.array([label_count(row) for row in rows], np.int64)
        largest = _largest_micro_batch(counts, batch_size, per_step, steps_per_epoch, total_steps, seed, shuffle)
        capacity = min(round_up(max(largest, 1), 16, 64, above=64), batch_size * padded_length)
        return cls(
            rows=rows,
            batch_size=batch_size,
            accumulation=accumulation,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
            pad_id=pad_id,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            padded_length=padded_length,
            capacity=capacity,
            label_counts=counts,
        )

    def step(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of optimiser step `step` (from 0), and the label tokens of all ranks' together.

        Raises IndexError beyond total_steps.
        """
        taken = self.step_rows(step)
        batches = []
        for micro in range(self.accumulation):
            start = (micro * self.world + self.rank) * self.batch_size
            rows = [self.rows[index] for index in taken[start : start + self.batch_size]]
            batches.append(collate(rows, self.batch_size, self.padded_length, self.capacity, self.pad_id))
        return batches, int(self.label_counts[taken].sum())

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the rows that all ranks together take in optimiser step `step`."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation * self.world
        return _order(len(self.rows), self.seed, epoch, self.shuffle)[within * per_step : (within + 1) * per_step]

    def checksum(self) -> int:
        """CRC-32 of all tokens and labels in the order of the rows: tells whether the data is the same."""
        total = 0
        for row in self.rows:
            total = crc32(row.labels.tobytes(), crc32(row.input_ids.tobytes(), total))
        return total

    def epoch_of(self, step: int) -> float:
        """Epochs that are done once `step` optimiser steps are done."""
        return step / self.steps_per_epoch


def _order(rows: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    return _permutation(rows, seed, epoch) if shuffle else np.arange(rows)


def _largest_micro_batch(
    counts: NDArray[np.int64],
    batch_size: int,
    per_step: int,
    steps_per_epoch: int,
    total_steps: int,
    seed: int,
    shuffle: bool,
) -> int:
    """Most label tokens of any micro-batch of any rank in the run."""
    largest = 0
    epochs = -(-total_steps // steps_per_epoch)
    for epoch in range(epochs if shuffle else min(epochs, 1)):  # unshuffled epochs are all alike
        steps = min(steps_per_epoch, total_steps - epoch * steps_per_epoch)
        taken = counts[_order(len(counts), seed, epoch, shuffle)][: steps * per_step]
        starts = np.arange(0, len(taken), batch_size)
        largest = max(largest, int(np.add.reduceat(taken, starts).max()))
    return largest
