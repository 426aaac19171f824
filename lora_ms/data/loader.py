"""From rows to the plan of a whole run: which rows each optimiser step takes, in which shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.collate import collate, label_count
from lora_ms.data.example import Batch, Example, TokenRow
from lora_ms.data.order import EpochOrder, MixedOrder, Source
from lora_ms.data.packing import Kind, Layout, MicroBatch, plan_layout
from lora_ms.data.report import Report
from lora_ms.data.store import TokenStore
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


@dataclass(frozen=True, eq=False)
class DataPlan:
    """The rows of every optimiser step of a run, as a function of the step: any step can be asked for at any time.

    A step takes the next batch_size * accumulation * world rows of the epoch's order, so that layouts with the same
    product (8x1, 4x2, two ranks of 4), padded, bucketed and packed, take the same rows in the same step. The last
    step of an epoch may be short. A rank has as many micro-batches as its share of the rows needs, perhaps none.
    """

    rows: TokenStore
    order: EpochOrder | MixedOrder
    layout: Layout
    per_step: int  # rows of a step on all ranks
    rank: int
    world: int  # ranks
    pad_id: int
    steps_per_epoch: int
    total_steps: int  # optimiser steps of the run

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
        kind: Kind = "padded",
        buckets: int = 4,
        sources: Sequence[Source] = (),
    ) -> DataPlan:
        """Fix the run's steps and shapes.

        batch_size: rows of one micro-batch on one rank; accumulation: micro-batches of one rank in a step. Packed, a
            micro-batch has at most the tokens that batch_size rows would have had, and a step any number of them.
        drop_remainder: leave out the last, short step of each epoch.
        seq_length: longest line, in tokens.
        max_steps: number of optimiser steps, whatever `epochs` says; -1: all of `epochs`.
        buckets: most lengths of line, for kind "bucketed".
        sources: datasets to mix by weight, in the order of the rows; none: every row once per epoch.

        Raises LoraMsError when drop_remainder leaves no step.
        """
        store, per_step = TokenStore.of(rows), batch_size * accumulation * world
        steps_per_epoch = len(store) // per_step if drop_remainder else -(-len(store) // per_step)
        if steps_per_epoch == 0:
            raise LoraMsError(
                f"drop_remainder leaves nothing to train on: {len(store)} rows, but a step takes {per_step} "
                f"(batch_size {batch_size} x accumulation {accumulation} x ranks {world}); "
                "set drop_remainder: False or lower batch_size"
            )
        total_steps = max_steps if max_steps > 0 else steps_per_epoch * epochs
        order: EpochOrder | MixedOrder = EpochOrder(len(store), per_step, steps_per_epoch, total_steps, seed, shuffle)
        if sources:
            order = MixedOrder(sources, per_step, total_steps, seed, shuffle)
        layout = plan_layout(
            kind,
            store.fed,
            store.label_counts,
            (order.step(step) for step in order.kinds_of_step()),
            batch_size=batch_size,
            buckets=buckets,
            seq_length=seq_length,
            per_step=per_step,
            world=world,
        )
        return cls(store, order, layout, per_step, rank, world, pad_id, steps_per_epoch, total_steps)

    def step(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of optimiser step `step` (from 0), and the label tokens of all ranks' together.

        Raises IndexError beyond total_steps.
        """
        taken = self.step_rows(step)
        laid = self.layout.lay(self.rows.fed[taken], self.rows.label_counts[taken])
        batches = [self._collate(taken, batch) for batch in laid[self.rank :: self.world]]
        return batches, int(self.rows.label_counts[taken].sum())

    def _collate(self, taken: NDArray[np.int64], batch: MicroBatch) -> Batch:
        lines = [[self.rows[int(taken[i])] for i in line] for line in batch.lines]
        return collate(lines, *batch.shape, self.pad_id)

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the rows that all ranks together take in optimiser step `step`."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        return self.order.step(step)

    def describe(self) -> str:
        """The shapes, for people."""
        sizes = ", ".join(f"{shape.lines}x{shape.length:,}" for shape in self.layout.shapes)
        return f"{self.layout.kind} in lines of {sizes}"

    def checksum(self) -> int:
        """Tells whether the rows are the same."""
        return self.rows.checksum()

    def epoch_of(self, step: int) -> float:
        """Epochs that are done once `step` optimiser steps are done."""
        return step / self.steps_per_epoch
