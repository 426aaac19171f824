"""``runner_config.adaptive_batch``: smaller micro-batches where memory is short. An optimiser step takes the same rows
whatever their size."""

from collections.abc import Callable

HIGH = 0.85  # share of memory in use above which micro-batches get smaller
LOW = 0.60  # and below which they get larger
REST = 10  # optimiser steps between two changes: a new size has to be compiled, which takes memory, too


class MemoryMonitor:
    """Chooses the level of ``DataPlan.step`` by the share of memory in use.

    Args:
        levels: the highest, with the smallest micro-batches.
        used: the share of memory in use now, from 0 to 1.
    """

    def __init__(self, levels: int, used: Callable[[], float]):
        self.levels = levels
        self.used = used
        self.level = 0
        self.rested = REST  # steps since the last change

    def next_level(self, too_much: bool, little: bool) -> int:
        """The level of the next step.

        too_much: whether some process of the run is above ``HIGH``; little: whether all are below ``LOW``.
        """
        self.rested += 1
        wanted = self.level + (1 if too_much else -1 if little else 0)
        wanted = min(max(wanted, 0), self.levels)
        if wanted != self.level and self.rested > REST:
            self.level = wanted
            self.rested = 0
        return self.level
