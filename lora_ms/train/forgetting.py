"""What a run learns and what it forgets: sets of rows that are scored before it, at its evaluations and after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.data.loader import DataPlan
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.runtime.device import Runtime
from lora_ms.train.callbacks import RunState, TrainerCallback
from lora_ms.train.evaluation import LabelScores
from lora_ms.train.parts import SummedLoss

REPORT, PLOT = "forgetting.json", "forgetting.png"
LOSS, EXACT, CHOICE = "loss", "exact", "choice"


@dataclass(frozen=True)
class ScoredSet:
    """Some rows, and what is counted of them.

    Attributes:
        metric: ``loss``; ``exact``, the share of rows whose label tokens each have the highest logit, which are those
            that greedy generation answers to the token; ``choice``, the share of questions whose right answer has the
            highest log-likelihood of all.
        plan: one pass over the rows; a row a micro-batch, but for ``loss``.
        choices: of each question how many of the rows are its answers; for ``choice``.
        right: of each question, which one is right.
    """

    metric: str
    plan: DataPlan
    choices: Sequence[int] = field(default=())
    right: Sequence[int] = field(default=())

    @property
    def rows(self) -> int:
        """Rows, or questions."""
        return len(self.choices) or len(self.plan.rows)

    @property
    def shown(self) -> str:
        """The score that is compared before and after."""
        return "loss" if self.metric == LOSS else "accuracy"


class SetScorer:
    """Scores sets on all ranks together; its graphs are compiled once for all of them.

    Args:
        model: see ``steps.Steps``.
        vocab_size: rows of the head.
    """

    def __init__(self, model: nn.Cell, sets: Mapping[str, ScoredSet], runtime: Runtime, vocab_size: int):
        self.model = model
        self.sets = sets
        self.label_scores = LabelScores(SummedLoss(model, vocab_size, runtime.shard))
        self.sum_over_data = runtime.data_sum()

    def scores(self) -> dict[str, dict[str, float]]:
        """``loss`` (nats per label token) and ``accuracy`` of each set."""
        training = self.model.training
        self.model.set_train(False)
        found = {name: self._scores(one) for name, one in self.sets.items()}
        self.model.set_train(training)
        return found

    def _scores(self, one: ScoredSet) -> dict[str, float]:
        counts = one.plan.rows.label_counts
        sums = self._summed(one)  # [micro-batches' first rows, 2]
        if one.metric == LOSS:
            accuracy = sums[:, 1].sum() / counts.sum()
            return {"loss": float(sums[:, 0].sum() / counts.sum()), "accuracy": float(accuracy)}
        if one.metric == EXACT:
            accuracy = np.mean(sums[:, 1] == counts)
            return {"loss": float(sums[:, 0].sum() / counts.sum()), "accuracy": float(accuracy)}
        first = np.cumsum([0, *one.choices])[:-1]
        best = [int(np.argmin(part)) for part in np.split(sums[:, 0], first[1:])]
        of_right = first + np.array(one.right)
        accuracy = np.mean(np.array(best) == one.right)
        return {"loss": float(sums[of_right, 0].sum() / counts[of_right].sum()), "accuracy": float(accuracy)}

    def _summed(self, one: ScoredSet) -> NDArray[np.float64]:
        """[rows, 2]: summed cross-entropy and tokens with the highest logit of each row; of a micro-batch of several,
        the first has all of it."""
        found = np.zeros((len(one.plan.rows), 2))
        for step in range(one.plan.steps_per_epoch):
            for rows, batch in one.plan.placed(step):
                values = self.label_scores(*map(Tensor, batch[:4]))
                found[int(rows[0])] = [float(value.asnumpy()) for value in values]
        if self.sum_over_data is not None:
            found = self.sum_over_data(Tensor(found.astype(np.float32))).asnumpy().astype(np.float64)
        return found


class ForgettingReport(TrainerCallback):
    """``forgetting.json``, ``forgetting.png`` and a line at the end."""

    def __init__(self, scorer: SetScorer):
        self.scorer = scorer
        self.points: list[dict[str, Any]] = []  # {"step": …, "scores": {set: {loss, accuracy}}}

    def on_train_begin(self, state: RunState) -> None:
        if state.step == 0:
            self._measure(state)
            return
        if state.is_main:
            self.points = [point for point in read_points(state.output_dir) if point["step"] <= state.step]

    def on_evaluation_due(self, state: RunState) -> None:
        self._measure(state)

    def on_train_end(self, state: RunState) -> None:
        if state.is_main and self.points and self.points[-1]["step"] == state.step > 0:
            print(self.line())

    def _measure(self, state: RunState) -> None:
        scores = self.scorer.scores()
        if not state.is_main:
            return
        self.points = [point for point in self.points if point["step"] < state.step]
        self.points.append({"step": state.step, "scores": scores})
        try:
            storage.write_json(state.output_dir / REPORT, self.as_json())
            if len(self.points) > 1:
                plot(self.points, {name: one.shown for name, one in self.scorer.sets.items()}, state.output_dir / PLOT)
        except WriteError as error:
            print(f"warning: {error}; the run goes on")

    def as_json(self) -> dict[str, Any]:
        """For each set: what it is, its scores before and after, and all points."""
        first, last = self.points[0]["scores"], self.points[-1]["scores"]
        sets = {}
        for name, one in self.scorer.sets.items():
            before, after = (scores.get(name, {}).get(one.shown) for scores in (first, last))
            sets[name] = {
                "metric": one.metric,
                "rows": one.rows,
                "compared": one.shown,
                "before": before,
                "after": after,
                "change": None if before is None or after is None else after - before,
            }
        return {"sets": sets, "points": self.points}

    def line(self) -> str:
        """``forgetting: general accuracy 80.0% -> 75.0% (-5.0 points); domain loss 5.1000 -> 1.2000 (-3.9000)``."""
        parts = []
        for name, one in self.as_json()["sets"].items():
            before, after, change = one["before"], one["after"], one["change"]
            if change is None:
                parts.append(f"{name} was not scored before")
            elif one["compared"] == "loss":
                parts.append(f"{name} loss {before:.4f} -> {after:.4f} ({change:+.4f})")
            else:
                parts.append(f"{name} accuracy {before:.1%} -> {after:.1%} ({100 * change:+.1f} points)")
        return f"forgetting: {'; '.join(parts)}"


def read_points(output_dir: Path) -> list[dict[str, Any]]:
    """The points of an earlier part of a run; none where there is no such file.

    Raises:
        LoraMsError: it is damaged.
    """
    file = output_dir / REPORT
    if not file.is_file():
        return []
    points: Any = storage.read_json(file).get("points")
    fits = isinstance(points, list) and all(isinstance(p, dict) and type(p.get("step")) is int for p in points)
    if not fits or not all(isinstance(point.get("scores"), dict) for point in points):
        raise LoraMsError(f"{file}: not what a run has written: remove it")
    return points


def plot(points: Sequence[Mapping[str, Any]], shown: Mapping[str, str], path: Path) -> None:
    """Draws the scores of each set over the steps into a PNG: losses above, accuracies below.

    Args:
        shown: of each set, ``loss`` or ``accuracy``.
    """
    from matplotlib.figure import Figure  # without pyplot, whose state is the user's, in a notebook
    from matplotlib.ticker import MaxNLocator

    kinds = [kind for kind in ("loss", "accuracy") if kind in shown.values()]
    figure = Figure(figsize=(7, 3 * len(kinds)), dpi=120, layout="constrained")
    for kind, axis in zip(kinds, figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0], strict=True):
        for name in (name for name, own in shown.items() if own == kind):
            found = [(p["step"], p["scores"][name][kind]) for p in points if name in p["scores"]]
            axis.plot([step for step, _ in found], [value for _, value in found], marker=".", label=name)
        axis.set(ylabel="loss (nats per label token)" if kind == "loss" else "accuracy", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axis.set_xlabel("optimiser step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    with saving.new_file(path) as part:
        figure.savefig(part, format="png")
