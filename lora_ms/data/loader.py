"""The plan of a whole run: which rows each optimiser step takes, in which shapes, and the steps as Tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_ms.data.collate import collate
from lora_ms.data.example import Batch, DeviceBatch, DeviceStep, TokenRow
from lora_ms.data.packing import Kind, Layout, MicroBatch, Shape, plain_tokens, plan_layout, smaller_batches
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.text import listed

Ints = NDArray[np.int64]
LOOKED_THROUGH = 200  # steps; of a longer run the shapes are those of its layout


class Source(NamedTuple):
    """One dataset of a mixture: its rows follow those of the source before it."""

    rows: int  # units, where several rows are one
    weight: float  # share of the rows of the first step, in proportion to the other sources'
    weight_end: float  # of the last step; in between the share moves on a line


class TermRows(Protocol):
    """What a further term of the loss needs of the rows of a micro-batch, beside ``Batch``.

    The term is a mean over units, such as pairs of rows, of all micro-batches of an optimiser step.
    """

    count: int  # of arrays

    def units(self, rows: Ints) -> int:
        """The units of a micro-batch of these rows."""

    def arrays(self, rows: Ints, label_counts: Ints, capacity: int, scale: float) -> tuple[NDArray, ...]:
        """Of the rows of a micro-batch, in the order of their slots. scale: label tokens over units, of the step."""

    def metrics(self, sums: NDArray[np.float64]) -> dict[str, float]:
        """What is shown of a step besides the loss, by the sums of the term's cell; nothing for most."""


@lru_cache(maxsize=16)
def permutation(rows: int, *seed: int) -> Ints:
    """A fixed shuffle."""
    order = np.random.default_rng(seed).permutation(rows)
    order.flags.writeable = False  # shared by all callers
    return order


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Every row once per epoch. Any step can be asked for at any time."""

    rows: int
    rows_per_step: int
    steps_per_epoch: int
    total_steps: int
    seed: int
    shuffle: bool

    def step(self, step: int) -> Ints:
        """Rows of optimiser step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = permutation(self.rows, self.seed, epoch) if self.shuffle else np.arange(self.rows)
        return order[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def distinct_steps(self) -> range:
        """The steps that differ: without shuffling, epochs are all alike."""
        return range(self.total_steps if self.shuffle else min(self.total_steps, self.steps_per_epoch))

    def identity(self) -> dict[str, object]:
        """What a run must share to go on with this order, besides rows and seed."""
        return {}


@dataclass(frozen=True, eq=False)
class MixedOrder:
    """Several datasets in shares that follow their weights to within a row; each goes round in its own epochs."""

    sources: Sequence[Source]
    rows_per_step: int
    total_steps: int
    seed: int
    shuffle: bool

    @cached_property
    def _taken(self) -> Ints:
        """[steps + 1, sources]: rows taken of each source before a step."""
        weights = np.array([[s.weight, s.weight_end] for s in self.sources], float)
        weights /= weights.sum(0)
        done = np.arange(self.total_steps) / max(self.total_steps - 1, 1)
        shares = weights[:, :1].T + done[:, None] * (weights[:, 1] - weights[:, 0])  # [steps, sources]
        owed = np.cumsum(self.rows_per_step * shares, 0)
        taken = np.zeros((self.total_steps + 1, len(self.sources)), np.int64)
        for step in range(self.total_steps):
            due = np.maximum(owed[step] - taken[step], 0.0)
            now = np.floor(due).astype(np.int64)
            # the rest goes to the largest remainders; what is too much comes off the smallest
            for _ in range(self.rows_per_step - int(now.sum())):
                now[np.argmax(due - now)] += 1
            while now.sum() > self.rows_per_step:
                now[np.argmin(np.where(now > 0, due - now, np.inf))] -= 1
            taken[step + 1] = taken[step] + now
        return taken

    def step(self, step: int) -> Ints:
        """Rows of optimiser step `step` (from 0)."""
        parts = []
        first = 0
        for number, source in enumerate(self.sources):
            counted = np.arange(self._taken[step, number], self._taken[step + 1, number])
            epochs, within = np.divmod(counted, source.rows)
            if self.shuffle:
                orders = {int(e): permutation(source.rows, self.seed, int(e), number + 1) for e in set(epochs)}
                within = np.array([orders[int(e)][w] for e, w in zip(epochs, within, strict=True)], np.int64)
            parts.append(first + within)
            first += source.rows
        return np.concatenate(parts)

    def distinct_steps(self) -> range:
        """The steps that differ."""
        return range(self.total_steps)

    def identity(self) -> dict[str, object]:
        """What a run must share to go on with this order, besides rows and seed."""
        return {"mix": [list(source) for source in self.sources], "mix_steps": self.total_steps}


@dataclass(frozen=True, eq=False)
class DataPlan:
    """The rows of every optimiser step of a run, as a function of the step: any step can be asked for at any time.

    A step takes the next batch_size * accumulation * world rows of the epoch's order, so that layouts with the same
    product (8x1, 4x2, two ranks of 4), padded, bucketed and packed, take the same rows in the same step. The last
    step of an epoch may be short. A rank has as many micro-batches as its share of the rows needs, perhaps none.

    With a `unit` of 2, two rows of the store, one after the other, belong together: they share a line, and are one row
    everywhere else in this class.
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
    terms: Sequence[TermRows] = ()  # of further terms of the loss
    unit: int = 1  # rows of the store that belong together
    virtual_tokens: int = 0  # at the beginning of every row of the store, which are no tokens of its own

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
        prefer_many_lines: bool = False,
        padding_cost: float = 1.0,
        unit: int = 1,
        virtual_tokens: int = 0,
    ) -> DataPlan:
        """Fix the run's steps and shapes.

        batch_size: rows of one micro-batch on one rank; accumulation: micro-batches of one rank in a step. Packed, a
            micro-batch has at most the tokens that batch_size rows would have had, and a step any number of them.
        drop_remainder: leave out the last, short step of each epoch.
        seq_length: longest line, in tokens.
        max_steps: number of optimiser steps, whatever `epochs` says; -1: all of `epochs`.
        buckets: most lengths of line, for kind "bucketed".
        sources: datasets to mix by weight, in the order of the rows; none: every row once per epoch.
        prefer_many_lines: packed, micro-batches of many lines rather than of long ones, so that they can be made
            smaller while the run goes on.
        padding_cost: packed, time of a token of padding, in that of another.
        unit: rows of the store that belong together. All other numbers of rows are numbers of units.
        virtual_tokens: at the beginning of every row of the store; they are not counted as tokens of a step.

        Raises LoraMsError when drop_remainder leaves no step.
        """
        store = TokenStore.of(rows)
        per_step = batch_size * accumulation * world
        count = len(store) // unit
        steps_per_epoch = count // per_step if drop_remainder else -(-count // per_step)
        if steps_per_epoch == 0:
            raise LoraMsError(
                f"drop_remainder leaves nothing to train on: {count} rows, but a step takes {per_step} "
                f"(batch_size {batch_size} x accumulation {accumulation} x ranks {world}); "
                "set drop_remainder: False or lower batch_size"
            )
        total_steps = max_steps if max_steps > 0 else steps_per_epoch * epochs
        order: EpochOrder | MixedOrder
        if sources:
            order = MixedOrder(
                sources=sources, rows_per_step=per_step, total_steps=total_steps, seed=seed, shuffle=shuffle
            )
        else:
            order = EpochOrder(
                rows=count,
                rows_per_step=per_step,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
                seed=seed,
                shuffle=shuffle,
            )
        layout = plan_layout(
            kind,
            _sums(store.input_lengths, unit),
            _sums(store.label_counts, unit),
            (order.step(step) for step in order.distinct_steps()),
            batch_size=batch_size,
            buckets=buckets,
            seq_length=seq_length,
            per_step=per_step,
            world=world,
            prefer_many_lines=prefer_many_lines,
            padding_cost=padding_cost,
        )
        return cls(
            rows=store,
            order=order,
            layout=layout,
            per_step=per_step,
            rank=rank,
            world=world,
            pad_id=pad_id,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            usual_lines=batch_size,
            unit=unit,
            virtual_tokens=virtual_tokens,
        )

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows) // self.unit

    def rows_of(self, row: int) -> list[TokenRow]:
        """The rows of the store that this one is."""
        return self.rows[row * self.unit : (row + 1) * self.unit]

    def where(self, row: int) -> str:
        """Name of a row, for error messages."""
        return self.rows.where(row * self.unit)

    @cached_property
    def lengths(self) -> Ints:
        """Of each row, the tokens that the model must see."""
        return _sums(self.rows.input_lengths, self.unit)

    @cached_property
    def label_counts(self) -> Ints:
        """Of each row, the tokens that are learnt."""
        return _sums(self.rows.label_counts, self.unit)

    def step(self, step: int, level: int = 0) -> tuple[list[Batch], int]:
        """This rank's micro-batches of optimiser step `step` (from 0), and the label tokens of all ranks' together.

        level: above 0, the same rows in micro-batches of 1 / 2^level of the lines.
        Raises IndexError beyond total_steps.
        """
        taken = self.step_rows(step)
        label_counts = self.label_counts[taken]
        of_all_ranks = self.layout.arrange(self.lengths[taken], label_counts)
        parts = [smaller_batches(batch, level) for batch in of_all_ranks]
        label_tokens = int(label_counts.sum())
        scales = []
        for term in self.terms:
            units = sum(term.units(taken[part.rows]) for of_rank in parts for part in of_rank)
            scales.append(label_tokens / units if units else 0.0)
        ours = [part for of_rank in parts[self.rank :: self.world] for part in of_rank]
        return [self._collate(taken, part, scales) for part in ours], label_tokens

    def _collate(self, taken: Ints, batch: MicroBatch, scales: Sequence[float] = ()) -> Batch:
        lines = [[row for i in line for row in self.rows_of(int(taken[i]))] for line in batch.lines]
        found = collate(
            lines,
            batch_size=batch.shape.lines,
            seq_length=batch.shape.length,
            capacity=batch.shape.capacity,
            pad_id=self.pad_id,
        )
        if self.virtual_tokens:
            found = found._replace(tokens=found.tokens - self.virtual_tokens * sum(map(len, lines)))
        if not self.terms:
            return found
        rows = taken[batch.rows]
        counts = self.label_counts[rows]
        pairs = zip(self.terms, scales, strict=True)
        extras = [term.arrays(rows, counts, batch.shape.capacity, scale) for term, scale in pairs]
        return found._replace(extras=tuple(array for arrays in extras for array in arrays))

    def placed(self, step: int) -> list[tuple[Ints, Batch]]:
        """This rank's micro-batches of a step, each with the indices of its rows in the order of their slots."""
        taken = self.step_rows(step)
        batches = self.layout.arrange(self.lengths[taken], self.label_counts[taken])
        return [(taken[batch.rows], self._collate(taken, batch)) for batch in batches[self.rank :: self.world]]

    def step_rows(self, step: int) -> Ints:
        """Indices of the rows that all ranks together take in optimiser step `step`."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        return self.order.step(step)

    def shapes_used(self) -> list[Shape]:
        """The shapes of this rank's micro-batches, in the order of their costs; in a long run, all of the layout's."""
        if self.total_steps > LOOKED_THROUGH:
            return list(self.layout.shapes)
        used = set()
        for step in range(self.total_steps):
            taken = self.step_rows(step)
            batches = self.layout.arrange(self.lengths[taken], self.label_counts[taken])
            used |= {batch.shape for batch in batches[self.rank :: self.world]}
        return [shape for shape in self.layout.shapes if shape in used]

    def cost(self) -> float:
        """Mean of this rank's steps, in tokens (see ``Shape.cost``). Of some dozen steps."""
        steps = range(0, self.total_steps, max(1, self.total_steps // 50))
        total = 0.0
        for step in steps:
            taken = self.step_rows(step)
            batches = self.layout.arrange(self.lengths[taken], self.label_counts[taken])
            total += sum(batch.shape.cost for batch in batches[self.rank :: self.world])
        return total / len(steps)

    def describe(self) -> str:
        """The shapes, for people."""
        shapes = self.layout.shapes
        lengths = listed([f"{shape.length:,}" for shape in shapes], separator=" or ")
        lines = listed([*dict.fromkeys(str(shape.lines) for shape in shapes)], separator=" or ")
        return f"{self.layout.kind} into lines of {lengths} tokens, {lines} per micro-batch"

    @property
    def levels(self) -> int:
        """The highest level of `step`: with that, a micro-batch has one line."""
        return max(shape.lines for shape in self.layout.shapes).bit_length() - 1

    def padding(self) -> dict[str, float]:
        """Share of padding in the slots: as laid out, and ("usual") with each batch as long as its longest
        row. Of some dozen steps."""
        input_tokens = 0
        computed = 0
        usual = 0
        for step in range(0, self.total_steps, max(1, self.total_steps // 50)):
            taken = self.step_rows(step)
            lengths = self.lengths[taken]
            input_tokens += int(lengths.sum())
            batches = self.layout.arrange(lengths, self.label_counts[taken])
            computed += sum(batch.shape.lines * batch.shape.length for batch in batches)
            usual += plain_tokens(lengths, self.usual_lines)
        return {
            self.layout.kind: round(1 - input_tokens / computed, 4),
            "usual": round(1 - input_tokens / usual, 4),
        }

    def checksum(self) -> int:
        """Tells whether the rows are the same."""
        return self.rows.checksum()

    def epoch_of(self, step: int) -> float:
        """Epochs that are done once `step` optimiser steps are done, the last one by the share of its rows."""
        whole, steps = divmod(step, self.steps_per_epoch)
        rows = min(len(self), self.steps_per_epoch * self.per_step)  # of an epoch
        return whole + steps * self.per_step / rows


def _sums(numbers: Ints, unit: int) -> Ints:
    return numbers if unit == 1 else numbers.reshape(-1, unit).sum(1)


COLUMNS = ["input_ids", "position_ids", "target_index", "targets", "counts"]


def device_steps(plan: DataPlan, start: int, level: int = 0) -> Iterator[DeviceStep]:
    """The steps of a plan from `start` on as Tensors, their micro-batches at `level` (see `DataPlan.step`).

    They are made in MindSpore's own data thread while the device computes.
    """
    import mindspore.dataset as ds

    extra = sum(term.count for term in plan.terms)

    def micro_batches() -> Iterator[tuple[NDArray, ...]]:
        """The arrays of a batch, and [micro-batches of the step still to come, tokens, label tokens of the step]."""
        for step in range(start, plan.total_steps):
            batches, label_tokens = plan.step(step, level)
            for number, batch in enumerate(batches, start=1):
                arrays = (batch.input_ids, batch.position_ids, batch.target_index, batch.targets)
                yield *arrays, *batch.extras, np.array([len(batches) - number, batch.tokens, label_tokens], np.int64)
            if not batches:  # nothing for this rank, which still takes part in the step
                yield *(np.zeros(1, np.int32) for _ in range(4 + extra)), np.array([-1, 0, label_tokens], np.int64)

    columns = [*COLUMNS[:-1], *(f"extra_{i}" for i in range(extra)), COLUMNS[-1]]
    dataset = ds.GeneratorDataset(micro_batches, columns, shuffle=False, num_parallel_workers=1)
    batches: list[DeviceBatch] = []
    tokens = 0
    for *tensors, counts in dataset.create_tuple_iterator(num_epochs=1, do_copy=False):
        to_come, more_tokens, label_tokens = counts.asnumpy().tolist()
        tokens += more_tokens
        if to_come >= 0:
            batches.append(DeviceBatch(*tensors[:4])._replace(extras=tuple(tensors[4:])))
        if to_come <= 0:
            yield DeviceStep(batches, tokens, label_tokens)
            batches = []
            tokens = 0
