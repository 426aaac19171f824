"""From rows to the plan of a whole run: which rows each optimiser step takes, in which shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.collate import collate
from lora_ms.data.example import Batch, TokenRow
from lora_ms.data.order import EpochOrder, MixedOrder, Source
from lora_ms.data.packing import Kind, Layout, MicroBatch, plan_layout, thinner
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError


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
    usual_lines: int  # rows that a padded micro-batch would have
    reports: list[dict] = field(default_factory=list)  # what became of the data, for data_report.json

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
        lines: bool = False,
    ) -> DataPlan:
        """Fix the run's steps and shapes.

        batch_size: rows of one micro-batch on one rank; accumulation: micro-batches of one rank in a step. Packed, a
            micro-batch has at most the tokens that batch_size rows would have had, and a step any number of them.
        drop_remainder: leave out the last, short step of each epoch.
        seq_length: longest line, in tokens.
        max_steps: number of optimiser steps, whatever `epochs` says; -1: all of `epochs`.
        buckets: most lengths of line, for kind "bucketed".
        sources: datasets to mix by weight, in the order of the rows; none: every row once per epoch.
        lines: packed, micro-batches of many lines rather than of long ones, so that they can be made smaller.

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
            lines=lines,
        )
        return cls(store, order, layout, per_step, rank, world, pad_id, steps_per_epoch, total_steps, batch_size)

    def step(self, step: int, level: int = 0) -> tuple[list[Batch], int]:
        """This rank's micro-batches of optimiser step `step` (from 0), and the label tokens of all ranks' together.

        level: above 0, the same rows in micro-batches of 1 / 2^level of the lines.
        Raises IndexError beyond total_steps.
        """
        taken = self.step_rows(step)
        laid = self.layout.lay(self.rows.fed[taken], self.rows.label_counts[taken])[self.rank :: self.world]
        batches = [self._collate(taken, batch) for whole in laid for batch in thinner(whole, level)]
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

    @property
    def levels(self) -> int:
        """The highest level of `step`: with that, a micro-batch has one line."""
        return max(shape.lines for shape in self.layout.shapes).bit_length() - 1

    def padding(self) -> dict[str, float]:
        """Share of padding in the computed tokens: as laid out, and ("usual") with each batch as long as its longest
        row. Of some dozen steps."""
        fed = computed = usual = 0
        for step in range(0, self.total_steps, max(1, self.total_steps // 50)):
            taken = self.step_rows(step)
            lengths = self.rows.fed[taken]
            fed += int(lengths.sum())
            laid = self.layout.lay(lengths, self.rows.label_counts[taken])
            computed += sum(batch.shape.lines * batch.shape.length for batch in laid)
            starts = np.arange(0, len(taken), self.usual_lines)
            usual += int((np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(taken))).sum())
        return {self.layout.kind: round(1 - fed / computed, 4), "usual": round(1 - fed / usual, 4)}

    def checksum(self) -> int:
        """Tells whether the rows are the same."""
        return self.rows.checksum()

    def epoch_of(self, step: int) -> float:
        """Epochs that are done once `step` optimiser steps are done."""
        return step / self.steps_per_epoch
