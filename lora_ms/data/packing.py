"""Which rows share a line, and which lines a micro-batch: padded, in length buckets, or packed.

All three arrange the rows of one optimiser step, which are the same whatever the layout: so are loss and gradient.
Rows are known here by two numbers each: `lengths`, the tokens that the model must see, and `labels`, the targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["padded", "bucketed", "packed"]
Ints = NDArray[np.int64]
Sample = list[tuple[Ints, Ints]]  # lengths and labels [rows] of some steps

SAMPLED_ROWS = 2048  # rows on which the shapes are tried out
SAMPLED_EPOCHS = 4  # of few rows
COMPILE_TOKENS = 30_000  # tokens that could be computed while one more shape is compiled
ATTENTION_LENGTH = 2048  # tokens of a line at which its attention costs as much as the rest
SLOT_COST = 0.3  # of a target slot, in tokens
EPOCHS = 3  # that a run is assumed to have
STEP_COST = 24  # of starting a micro-batch, in tokens
GAIN = 0.01  # share of padding by which packing is to beat plain batches; of the rows that are tried out
MOST_SHAPES = 2
MOST_OF_SINGLE_ROWS = 3  # where a micro-batch is one row, whose padding only a shape of its own makes less
SMALL_RUN = 5000  # tokens below which padding costs less than the compilation of a second shape


class Shape(NamedTuple):
    """What one compiled graph takes."""

    lines: int  # of a micro-batch
    length: int  # tokens of a line
    capacity: int  # target slots of a micro-batch

    @property
    def cost(self) -> float:
        """Rough time of a micro-batch, in tokens."""
        tokens = self.lines * self.length * (1 + self.length / ATTENTION_LENGTH)
        return tokens + SLOT_COST * self.capacity + STEP_COST


class MicroBatch(NamedTuple):
    """Rows, by their number in the step, as they share the lines of one micro-batch."""

    shape: Shape
    lines: list[list[int]]

    @property
    def rows(self) -> list[int]:
        """All of them, in the order of their slots."""
        return [row for line in self.lines for row in line]


def smaller_batches(batch: MicroBatch, level: int) -> list[MicroBatch]:
    """The rows of a micro-batch in several with 1 / 2^`level` of its lines each, at least one."""
    lines, length, capacity = batch.shape
    fewer = max(1, lines >> level)
    if fewer == lines:
        return [batch]
    shape = Shape(fewer, length, min(capacity, fewer * length))
    return [MicroBatch(shape, batch.lines[start : start + fewer]) for start in range(0, len(batch.lines), fewer)]


def round_up(value: int, fine: int, coarse: int, above: int) -> int:
    """The multiple of `fine` (beyond `above`: of `coarse`) next above `value`. Few shapes, few compilations."""
    unit = coarse if value > above else fine
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are arranged; `shapes` are the only ones used, in ascending order of cost."""

    kind: Kind
    batch_size: int  # rows of a micro-batch where it is not packed
    shapes: tuple[Shape, ...]

    def arrange(self, lengths: Ints, labels: Ints) -> list[MicroBatch]:
        """The micro-batches of one step: lengths, labels [rows]. The ranks take the results in turn."""
        if self.kind == "packed":
            return self._packed(lengths, labels)
        order = np.arange(len(lengths)) if self.kind == "padded" else np.argsort(lengths, kind="stable")
        batches = []
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            shape = self._shape_for(int(lengths[chunk].max()), int(labels[chunk].sum()))
            batches.append(MicroBatch(shape, [[int(row)] for row in chunk]))
        return batches

    def padding(self, sample: Sample) -> float:
        """Share of padding in the steps of `sample`."""
        totals = np.array([lengths.sum() for lengths, _ in sample])
        return padding_of(totals, [self.arrange(*step) for step in sample])

    def _shape_for(self, longest: int, targets: int, lines: int = 1) -> Shape:
        return next(s for s in self.shapes if s.length >= longest and s.capacity >= targets and s.lines >= lines)

    def _packed(self, lengths: Ints, labels: Ints) -> list[MicroBatch]:
        largest = self.shapes[-1]
        packed = first_fit(lengths, labels, largest.length, largest.capacity // largest.lines)
        return self._grouped(packed, lengths, labels)

    def _grouped(self, packed: tuple[list[list[int]], Ints], lengths: Ints, labels: Ints) -> list[MicroBatch]:
        lines, fills = packed
        # fullest first, so that what is left over for the smaller shapes is least
        order = np.argsort(-fills[:, 0], kind="stable")
        batches = []
        size = self.shapes[-1].lines
        for start in range(0, len(lines), size):
            group = order[start : start + size]
            shape = self._shape_for(int(fills[group, 0].max()), int(fills[group, 1].sum()), len(group))
            batches.append(MicroBatch(shape, [lines[i] for i in group]))
        return batches[:-1] + self._split(batches[-1], lengths, labels)

    def _split(self, last: MicroBatch, lengths: Ints, labels: Ints) -> list[MicroBatch]:
        """The last micro-batch, or smaller ones with its rows where they cost less."""
        best = [last]
        rows = np.array([row for line in last.lines for row in line])
        for shape in self.shapes:
            slots = shape.capacity // shape.lines
            if shape.cost >= last.shape.cost or lengths[rows].max() > shape.length or labels[rows].max() > slots:
                continue
            packed, _ = first_fit(lengths[rows], labels[rows], shape.length, slots)
            lines = [[int(rows[i]) for i in line] for line in packed]
            split = [MicroBatch(shape, lines[i : i + shape.lines]) for i in range(0, len(lines), shape.lines)]
            best = min(best, split, key=lambda batches: sum(batch.shape.cost for batch in batches))
        return best


def first_fit(lengths: Ints, labels: Ints, length: int, capacity: int) -> tuple[list[list[int]], Ints]:
    """First-fit-decreasing: rows in lines of `length` tokens and `capacity` targets; [lines, 2] are their sums."""
    lines: list[list[int]] = []
    fills = np.zeros((len(lengths), 2), np.int64)
    for row in np.argsort(-lengths, kind="stable"):
        need = (lengths[row], labels[row])
        used = fills[: len(lines)]
        fits = np.flatnonzero((used[:, 0] + need[0] <= length) & (used[:, 1] + need[1] <= capacity))
        place = int(fits[0]) if fits.size else len(lines)
        if place == len(lines):
            lines.append([])
        lines[place].append(int(row))
        fills[place] += need
    return lines, fills[: len(lines)]


def plan_layout(
    kind: Kind,
    lengths: Ints,
    labels: Ints,
    steps: Sequence[Ints] | Iterator[Ints],
    *,
    batch_size: int,
    buckets: int,
    seq_length: int,
    per_step: int,
    world: int,
    prefer_many_lines: bool = False,
    padding_cost: float = 1.0,
) -> Layout:
    """The shapes of a run of which `steps` are the rows, `per_step` each, in the order of the steps.

    prefer_many_lines: as many lines in a micro-batch as it has room for, none longer than the longest row needs.
    padding_cost: time of a token of padding, in that of another; below 1, the fewest shapes matter more than padding.

    Padded and bucketed shapes come from all steps and so always suffice. Packed shapes are tried out on some of the
    rows; what they cannot hold opens another line. Where packing would leave more padding than plain batches of several
    rows, rows are not packed, unless padding costs little: the result is bucketed.
    """
    if kind == "packed":
        sample = _sample(lengths, labels, per_step)
        total_steps = EPOCHS * -(-len(lengths) // per_step)
        any_padding = prefer_many_lines or padding_cost < 1 or batch_size == 1
        allowed = 1.0 if any_padding else plain_padding(sample, batch_size) - GAIN
        packed = _plan_packed(
            sample,
            total_steps,
            int(lengths.max()),
            int(labels.max()),
            allowed,
            batch_size=batch_size,
            seq_length=seq_length,
            world=world,
            prefer_many_lines=prefer_many_lines,
            padding_cost=padding_cost,
        )
        padding = packed.padding(sample)
        if padding <= allowed:
            return packed
        kind, buckets = "bucketed", _most_shapes(sample, total_steps, batch_size, padding_cost)
        if padding <= bucketed_padding(sample, batch_size, padded_length(int(lengths.max()), seq_length), buckets):
            return packed
    return _plan_plain(kind, lengths, labels, steps, batch_size=batch_size, buckets=buckets, seq_length=seq_length)


def _plan_plain(
    kind: Kind,
    lengths: Ints,
    labels: Ints,
    steps: Sequence[Ints] | Iterator[Ints],
    *,
    batch_size: int,
    buckets: int,
    seq_length: int,
) -> Layout:
    """Each row in a line of its own."""
    longest_of_batches = []
    labels_of_batches = []
    for taken in steps:
        order = taken if kind == "padded" else taken[np.argsort(lengths[taken], kind="stable")]
        starts = np.arange(0, len(order), batch_size)
        longest_of_batches.append(np.maximum.reduceat(lengths[order], starts))
        labels_of_batches.append(np.add.reduceat(labels[order], starts))
    longest = np.concatenate(longest_of_batches)
    label_sums = np.concatenate(labels_of_batches)
    top = padded_length(int(lengths.max()), seq_length)
    edges = [top] if kind == "padded" else _edges(longest, buckets, top)
    shapes = []
    capacity = 0
    for edge in edges:
        inside = label_sums[longest <= edge]
        largest = round_up(max(int(inside.max(initial=0)), 1), 16, 64, above=64)
        capacity = max(capacity, min(largest, batch_size * edge))
        shapes.append(Shape(batch_size, edge, capacity))
    return Layout(kind, batch_size, tuple(shapes))


def padded_length(longest: int, seq_length: int) -> int:
    """Tokens of a line that holds the longest row."""
    return max(min(round_up(longest, 16, 64, above=512), seq_length), longest)


def _edges(longest: Ints, buckets: int, top: int) -> list[int]:
    """At most `buckets` lengths, up to `top`, that leave the least padding (by dynamic programming)."""
    counts: dict[int, int] = {}
    for length in longest:
        edge = min(round_up(int(length), 16, 64, above=512), top)
        counts[edge] = counts.get(edge, 0) + 1
    candidates = sorted({*counts, top})
    best: list[tuple[float, list[int]]] = []
    for last, edge in enumerate(candidates):  # best[last]: cheapest edges for all up to this one
        options = []
        for before in range(-1, last):
            cost, chosen = (0.0, []) if before < 0 else best[before]
            if len(chosen) < buckets - (edge != top):
                covered = sum(counts.get(c, 0) for c in candidates[before + 1 : last + 1])
                options.append((cost + covered * edge, [*chosen, edge]))
        best.append(min(options, key=lambda option: option[0]) if options else (np.inf, []))
    return best[-1][1]


def _sample(lengths: Ints, labels: Ints, per_step: int) -> Sample:
    """Some steps, of rows at random: a run that goes on longer must find the same shapes."""
    draws = np.random.default_rng(0)
    found = []
    for _ in range(max(1, min(SAMPLED_EPOCHS, SAMPLED_ROWS // len(lengths)))):
        mixed = draws.permutation(len(lengths))[: max(SAMPLED_ROWS, per_step)]
        steps = (mixed[start : start + per_step] for start in range(0, len(mixed), per_step))
        found += [(lengths[taken], labels[taken]) for taken in steps]
    return found


def plain_tokens(lengths: Ints, batch_size: int) -> int:
    """Tokens of a step in batches of rows in their order, each as long as its longest row."""
    starts = np.arange(0, len(lengths), batch_size)
    return int((np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))).sum())


def plain_padding(sample: Sample, batch_size: int) -> float:
    """Share of padding in plain batches."""
    tokens = sum(int(lengths.sum()) for lengths, _ in sample)
    return 1 - tokens / sum(plain_tokens(lengths, batch_size) for lengths, _ in sample)


def _most_shapes(sample: Sample, total_steps: int, batch_size: int, padding_cost: float) -> int:
    """How many shapes a run of steps like those of `sample` may compile."""
    tokens = sum(int(lengths.sum()) for lengths, _ in sample)
    if tokens / len(sample) * total_steps < SMALL_RUN:
        return 1
    return MOST_OF_SINGLE_ROWS if batch_size == 1 and padding_cost == 1 else MOST_SHAPES


def bucketed_padding(sample: Sample, batch_size: int, top: int, buckets: int) -> float:
    """Share of padding in batches of rows of like lengths, padded to one of `buckets` lengths, `top` at most."""
    longest = []
    for lengths, _ in sample:
        longest.append(np.maximum.reduceat(np.sort(lengths), np.arange(0, len(lengths), batch_size)))
    of_batches = np.concatenate(longest)
    edges = np.array(_edges(of_batches, buckets, top))
    computed = batch_size * int(edges[np.searchsorted(edges, of_batches)].sum())
    return 1 - sum(int(lengths.sum()) for lengths, _ in sample) / computed


def _plan_packed(
    sample: Sample,
    total_steps: int,
    longest: int,
    most_labels: int,
    allowed: float,
    *,
    batch_size: int,
    seq_length: int,
    world: int,
    prefer_many_lines: bool,
    padding_cost: float,
) -> Layout:
    """Tries shapes out on some steps, and takes those of the lowest cost whose share of padding is at most `allowed`.

    Where all pad more, those that pad least. longest, most_labels: of all rows, which must fit in the largest shape.
    """
    shortest_line = padded_length(longest, seq_length)
    most_shapes = _most_shapes(sample, total_steps, batch_size, padding_cost)
    room = batch_size * shortest_line  # tokens that a padded micro-batch would have
    longest_line = shortest_line if prefer_many_lines else max(min(seq_length, room), shortest_line)
    totals = np.array([lengths.sum() for lengths, _ in sample])
    best: tuple[float, float, Layout] | None = None  # padding beyond what is allowed, cost
    for length in _line_lengths(totals, shortest_line, longest_line):
        packed = [first_fit(*step, length, length) for step in sample]
        filled = np.concatenate([fills[:, 1] for _, fills in packed])
        most = _slots(max(most_labels, int(filled.max())), length)
        typical = _slots(int(np.quantile(filled, 0.85)), length)
        lines = 1 << (batch_size.bit_length() - 1) if prefer_many_lines else 1
        while lines * length <= room:
            for layout in _layouts(batch_size, lines, length, most, typical, totals):
                if len(layout.shapes) > most_shapes:
                    continue
                arranged = [layout._grouped(lines_of, *step) for lines_of, step in zip(packed, sample, strict=True)]
                beyond = max(padding_of(totals, arranged) - allowed, 0.0)
                cost = _run_cost([step[::world] for step in arranged], total_steps, padding_cost)
                if best is None or (beyond, cost) < (best[0], (1.0 if beyond < best[0] else 0.995) * best[1]):
                    best = (beyond, cost, layout)
            lines *= 2
    assert best is not None  # one line of the shortest length always fits
    return best[2]


def padding_of(totals: Ints, arranged: Sequence[list[MicroBatch]]) -> float:
    """Share of padding in steps of `totals` tokens."""
    return 1 - int(totals.sum()) / sum(batch.shape.lines * batch.shape.length for step in arranged for batch in step)


def _line_lengths(totals: Ints, shortest: int, longest: int) -> list[int]:
    """Lengths of line to try: the shortest one doubled, and those that a step fills 1, 2, 3, 4, 6, 8, … times."""
    found = {shortest << times for times in range((longest // shortest).bit_length())}
    for count in (1, 2, 3, 4, 6, 8, 12, 16):
        for total in (totals.max(), np.median(totals)):
            found.add(round_up(int(-(-total // count)), 8, 64, above=512))
    return sorted(length for length in found if shortest <= length <= longest)


def _layouts(batch_size: int, lines: int, length: int, most: int, typical: int, totals: Ints) -> Iterator[Layout]:
    """Layouts of `lines` x `length`, alone and with smaller shapes; most, typical: targets of a line."""
    for parts in ((), (2,), (4,), (2, 4)):
        for slots in ((most,), (typical, most)) if typical < most else ((most,),):
            yield Layout("packed", batch_size, _shapes(lines, length, slots, parts))
    if lines == 1:  # a whole step in a line, which is shorter where the step is
        edges = _edges(totals[totals <= length], 2, length)
        if len(edges) == 2:
            shorter = Shape(1, edges[0], min(most, edges[0]))
            yield Layout("packed", batch_size, (shorter, Shape(1, length, most)))


def _slots(labels: int, length: int) -> int:
    return min(round_up(max(labels, 1), 16, 64, above=64), length)


def _shapes(lines: int, length: int, slots: tuple[int, ...], parts: tuple[int, ...]) -> tuple[Shape, ...]:
    """`lines` x `length` with each of `slots` targets a line, after shapes of 1/`parts` of the tokens."""
    shapes = {Shape(lines, length, lines * count) for count in slots}
    for part in parts:
        fewer = (lines // part, length) if lines >= part else (1, lines * length // part)
        if fewer[1] >= 16:
            shapes.add(Shape(*fewer, fewer[0] * min(slots[0], fewer[1])))
    return tuple(sorted(shapes, key=lambda shape: shape.cost))


def _run_cost(steps: list[list[MicroBatch]], total_steps: int, padding_cost: float) -> float:
    """Rough time of a run of such steps, in tokens, its compilations included; without what it takes in any layout."""
    used = {batch.shape for step in steps for batch in step}
    a_step = sum(STEP_COST + padding_cost * (batch.shape.cost - STEP_COST) for step in steps for batch in step)
    a_step /= len(steps)
    return a_step * total_steps + COMPILE_TOKENS * len(used)
