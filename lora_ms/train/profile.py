"""Where the time of some steps goes: MindSpore's profile, and its slowest operators as a table."""

import contextlib
import csv
import io
from pathlib import Path
from typing import NamedTuple

from mindspore.profiler import profile, tensorboard_trace_handler
from tqdm import tqdm

from lora_ms.train.callbacks import RunState, StepRecord, TrainerCallback

SHOWN = 10  # operators
# The file with one line for each kind of operator -> its columns of name, calls and time; ms in a unit of the time.
TABLES = {
    "cpu_op_type_info_*.csv": ("op_type", "type_occurrences", "total_compute_time", 1.0),
    "op_statistic.csv": ("OP Type", "Count", "Total Time(us)", 1e-3),  # Ascend, as documented
}


class OperatorCost(NamedTuple):
    """The time of all operators of one kind."""

    name: str
    calls: int
    milliseconds: float


def read_costs(folder: Path) -> list[OperatorCost]:
    """From the profile under ``folder``, the slowest first; empty where it holds no such table."""
    costs = []
    for pattern, (name, calls, time, unit) in TABLES.items():
        for file in sorted(folder.rglob(pattern)):
            with open(file, newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            costs += [OperatorCost(row[name], int(row[calls]), float(row[time]) * unit) for row in rows]
    return sorted(costs, key=lambda cost: -cost.milliseconds)


def table(costs: list[OperatorCost]) -> list[str]:
    """The slowest of them as lines of at most 80 columns."""
    total = sum(cost.milliseconds for cost in costs) or 1.0
    lines = [f"  {'operator':<44} {'calls':>12} {'total ms':>12} {'share':>7}"]
    for cost in costs[:SHOWN]:
        name = cost.name if len(cost.name) <= 44 else f"{cost.name[:43]}…"
        lines.append(f"  {name:<44} {cost.calls:>12,} {cost.milliseconds:>12,.1f} {cost.milliseconds / total:>7.1%}")
    return lines


class Profiling(TrainerCallback):
    """Profiles steps ``first`` to ``last`` on the main rank into ``folder``, and prints the slowest operators.

    Where the losses of several steps are read at once, it begins and ends between two reads. An evaluation in between
    is included.
    """

    def __init__(self, folder: Path, first: int, last: int):
        self.folder = folder
        self.first = first
        self.last = last
        self.profile: profile | None = None
        self.begun = 0  # the first step that is profiled
        self.earlier: set[Path] = set()  # what stood in the folder before

    def on_train_begin(self, state: RunState) -> None:
        self.due = state.is_main and state.step < self.last
        if self.due:
            self._start(state)

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        if not state.is_main or record.step < state.step:  # others that were read with it follow
            return
        if self.profile is not None and record.step >= self.last:
            self._stop(record.step)
        self._start(state)

    def on_train_end(self, state: RunState) -> None:
        if self.profile is not None:
            self._stop(state.step)
        elif state.is_main and not self.begun:
            tqdm.write(f"no profile: none of the steps {self.first} to {self.last} was run")

    def _start(self, state: RunState) -> None:
        if self.due and not self.begun and self.first <= state.step + 1 <= state.total_steps:
            self.begun = state.step + 1
            self.earlier = self._profiles()
            self.profile = profile(on_trace_ready=tensorboard_trace_handler(str(self.folder)))
            self.profile.start()

    def _stop(self, step: int) -> None:
        if self.profile is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # the bars of MindSpore's own evaluation
                self.profile.stop()
        self.profile = None
        costs = [cost for new in self._profiles() - self.earlier for cost in read_costs(new)]
        total = sum(cost.milliseconds for cost in costs)
        head = f"profile of steps {self.begun} to {step}: {total:,.1f} ms in operators; files in {self.folder}"
        tqdm.write("\n".join([head, *(table(costs) if costs else [])]))  # above a bar

    def _profiles(self) -> set[Path]:
        return set(self.folder.glob("*"))
