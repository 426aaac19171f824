"""Micro-batches that follow the memory there is; an optimiser step takes the same rows whatever their size."""

from collections.abc import Callable

HIGH, LOW = 0.85, 0.60  # of the memory in use: above the one micro-batches get smaller, below the other larger
REST = 10  # optimiser steps between two changes: a new size is compiled first, and takes memory for it


class MemoryMonitor:
    """Chooses the level of ``DataPlan.step`` by the share of memory in use.

    Args:
        levels: the highest, with the smallest micro-batches.
        used: the share of memory in use now, from 0 to 1.
    """

    def __init__(self, levels: int, used: Callable[[], float]):
        self.levels, self.used = levels, used
        self.level, self.rested = 0, REST

    def next_level(self, too_much: bool, little: bool) -> int:
        """The level of the next step.

        too_much: whether some process of the run is above ``HIGH``; little: whether all are below ``LOW``.
        """
        self.rested += 1
        wanted = self.level + (1 if too_much else -1 if little else 0)
        wanted = min(max(wanted, 0), self.levels)
        if wanted != self.level and self.rested > REST:
            self.level, self.rested = wanted, 0
        return self.level
