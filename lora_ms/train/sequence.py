"""Scores of tasks that are learnt one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms import saving


@dataclass(frozen=True, eq=False)
class TaskMatrix:
    """How every task is answered after each.

        mean               mean over tasks of the last row
        backward transfer  mean over all tasks but the last of the last row less the diagonal: below 0 what was learnt
                           is lost again (of losses: above 0)

    as Lopez-Paz and Ranzato (2017) have it.
    """

    names: Sequence[str]  # of the tasks, in the order of learning
    shown: Sequence[str]  # of each, ``loss`` or ``accuracy``
    before: NDArray[np.float64]  # [tasks]: before the first
    scores: NDArray[np.float64]  # [tasks learnt, tasks]

    @property
    def mean(self) -> float:
        return float(self.scores[-1].mean())

    @property
    def backward_transfer(self) -> float | None:
        """The backward transfer; None after one task."""
        learnt = len(self.scores)
        if learnt < 2:
            return None
        earlier = np.arange(learnt - 1)
        return float(np.mean(self.scores[-1, earlier] - self.scores[earlier, earlier]))

    def as_json(self) -> dict[str, Any]:
        """For ``sequence.json``."""
        return {
            "tasks": list(self.names),
            "compared": list(self.shown),
            "before": self.before.tolist(),
            "matrix": self.scores.tolist(),
            "mean": self.mean,
            "backward_transfer": self.backward_transfer,
        }

    def lines(self) -> list[str]:
        """A table, and the two numbers."""
        width = max(9, *(len(name) + 1 for name in self.names))
        rows = [("before", self.before), *zip(self.names, self.scores, strict=False)]
        table = ["after \\ on".ljust(width + 2) + "".join(name.rjust(width) for name in self.names)]
        for name, row in rows:
            cells = [f"{x:.4f}" if kind == "loss" else f"{x:.1%}" for x, kind in zip(row, self.shown, strict=True)]
            table.append(name.ljust(width + 2) + "".join(cell.rjust(width) for cell in cells))
        kinds = set(self.shown)
        moved = self.backward_transfer
        if kinds == {"accuracy"}:
            text = f"mean accuracy {self.mean:.1%}"
            transfer = "" if moved is None else f", backward transfer {100 * moved:+.1f} points"
        else:
            text = f"mean {'loss' if kinds == {'loss'} else 'score'} {self.mean:.4f}"
            transfer = "" if moved is None else f", backward transfer {moved:+.4f}"
        return [*table, f"sequence: {text} after {len(self.scores)} of {len(self.names)} tasks{transfer}"]

    def plot(self, path: Path) -> None:
        """Draws the score of each task after each into a PNG."""
        from matplotlib.figure import Figure  # without pyplot, whose state is the user's, in a notebook

        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axis = figure.subplots()
        values = np.concatenate([self.before[None], self.scores])
        for number, name in enumerate(self.names):
            axis.plot(range(len(values)), values[:, number], marker="o", label=name)
        axis.set_xticks(range(len(values)), ["before", *self.names[: len(self.scores)]])
        axis.set(xlabel="after task", ylabel=" and ".join(sorted(set(self.shown))), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        with saving.new_file(path) as part:
            figure.savefig(part, format="png")
