"""Which rows a step takes: an epoch's order, or several datasets by weight. Any step can be asked for at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Source(NamedTuple):
    """One dataset of a mixture: its rows follow those of the source before it."""

    rows: int
    weight: float  # share of the rows of the first step, in proportion to the other sources'
    weight_end: float  # of the last step; in between the share moves on a line


@lru_cache(maxsize=16)
def permutation(rows: int, *seed: int) -> Ints:
    """A fixed shuffle."""
    order = np.random.default_rng(seed).permutation(rows)
    order.flags.writeable = False  # shared by all callers
    return order


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Every row once per epoch."""

    rows: int
    per_step: int
    steps_per_epoch: int
    total_steps: int
    seed: int
    shuffle: bool

    def step(self, step: int) -> Ints:
        """Rows of optimiser step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = permutation(self.rows, self.seed, epoch) if self.shuffle else np.arange(self.rows)
        return order[within * self.per_step : (within + 1) * self.per_step]

    def kinds_of_step(self) -> range:
        """Steps that differ: without shuffling, epochs are all alike."""
        return range(self.total_steps if self.shuffle else min(self.total_steps, self.steps_per_epoch))

    def identity(self) -> dict[str, object]:
        """What a run must share to go on with this order, besides rows and seed."""
        return {}


@dataclass(frozen=True, eq=False)
class MixedOrder:
    """Shares that follow the weights to within a row; every source goes round in its own epochs."""

    sources: Sequence[Source]
    per_step: int
    total_steps: int
    seed: int
    shuffle: bool

    @cached_property
    def _taken(self) -> Ints:
        """[steps + 1, sources]: rows taken of each source before a step."""
        weights = np.array([[s.weight, s.weight_end] for s in self.sources], float)
        weights /= weights.sum(0)
        done = np.arange(self.total_steps) / max(self.total_steps - 1, 1)
        owed = np.cumsum(self.per_step * (weights[:, :1].T + done[:, None] * (weights[:, 1] - weights[:, 0])), 0)
        taken = np.zeros((self.total_steps + 1, len(self.sources)), np.int64)
        for step in range(self.total_steps):
            due = np.maximum(owed[step] - taken[step], 0.0)
            now = np.floor(due).astype(np.int64)
            # the rest goes to the largest remainders; what is too much comes off the smallest
            for _ in range(self.per_step - int(now.sum())):
                now[np.argmax(due - now)] += 1
            while now.sum() > self.per_step:
                now[np.argmin(np.where(now > 0, due - now, np.inf))] -= 1
            taken[step + 1] = taken[step] + now
        return taken

    def step(self, step: int) -> Ints:
        """Rows of optimiser step `step` (from 0)."""
        parts, first = [], 0
        for number, source in enumerate(self.sources):
            places = np.arange(self._taken[step, number], self._taken[step + 1, number])
            epochs, within = np.divmod(places, source.rows)
            if self.shuffle:
                orders = {int(e): permutation(source.rows, self.seed, int(e), number + 1) for e in set(epochs)}
                within = np.array([orders[int(e)][w] for e, w in zip(epochs, within, strict=True)], np.int64)
            parts.append(first + within)
            first += source.rows
        return np.concatenate(parts)

    def kinds_of_step(self) -> range:
        """Steps that differ."""
        return range(self.total_steps)

    def identity(self) -> dict[str, object]:
        """What a run must share to go on with this order, besides rows and seed."""
        return {"mix": [list(source) for source in self.sources], "mix_steps": self.total_steps}
