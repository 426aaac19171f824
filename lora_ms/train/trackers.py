"""The numbers of a run for Weights & Biases, SwanLab and MLflow: ``report_to``."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_ms.errors import LoraMsError
from lora_ms.train.callbacks import RunState
from lora_ms.train.tensorboard import Scalars, TensorBoard

# what report_to may name: the module that it needs, and how that is installed
REPORTS = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "swanlab": ("swanlab", "swanlab"),
    "mlflow": ("mlflow", "mlflow"),
}


def installed() -> list[str]:
    """Those of ``REPORTS`` that are installed."""
    return [name for name, (module, _) in REPORTS.items() if find_spec(module) is not None]


def check(report_to: Sequence[str]) -> None:
    """Raises LoraMsError where what ``report_to`` names is not installed."""
    for name in report_to:
        module, package = REPORTS[name]
        if find_spec(module) is None:
            raise LoraMsError(f"report_to {name} needs {package}: pip install {package}")


class Tracker(Scalars):
    """Hands the numbers to a package of its own, whose errors cost numbers there and never the run.

    Args:
        folder: of the run; a package keeps there what it has on disk, in a folder of its own name.
        name: of the run, there.
    """

    title = ""

    def __init__(self, folder: Path, every: int, name: str):
        super().__init__(folder, every)
        self.name = name
        self.lost = False  # whether numbers are missing there, and the user knows

    def on_train_begin(self, state: RunState) -> None:
        if state.is_main:
            self._try("start", state)

    def take(self, step: int, values: dict[str, float]) -> None:
        if not self.lost:
            self._try("send", step, values)

    def on_train_end(self, state: RunState) -> None:
        if state.is_main and not self.lost:
            self._try("finish")

    def _try(self, what: str, *args: Any) -> None:
        try:
            getattr(self, what)(*args)
        except Exception as error:  # whatever a tracker raises, the run goes on
            reason = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"warning: report_to {self.title}: {reason[:200]}; the run goes on without it")
            self.lost = True

    def start(self, state: RunState) -> None:
        """Opens the run."""
        raise NotImplementedError

    def send(self, step: int, values: dict[str, float]) -> None:
        """Numbers by tag."""
        raise NotImplementedError

    def finish(self) -> None:
        """Closes it."""
        raise NotImplementedError


class Wandb(Tracker):
    """Weights & Biases; WANDB_MODE=offline needs no network, WANDB_PROJECT and WANDB_DIR are its own."""

    title = "wandb"

    def start(self, state: RunState) -> None:
        import wandb

        self.run = wandb.init(name=self.name, dir=str(self.folder), settings=wandb.Settings(console="off"))

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class SwanLab(Tracker):
    """SwanLab; SWANLAB_MODE=offline or local needs no network."""

    title = "swanlab"

    def start(self, state: RunState) -> None:
        import swanlab

        self.run = swanlab.init(experiment_name=self.name, logdir=str(self.folder / "swanlog"))

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """MLflow; without MLFLOW_TRACKING_URI it keeps its files where it always does: in the working folder."""

    title = "mlflow"

    def start(self, state: RunState) -> None:
        import mlflow

        self.run = mlflow.start_run(run_name=self.name)

    def send(self, step: int, values: dict[str, float]) -> None:
        import mlflow

        mlflow.log_metrics(values, step=step, run_id=self.run.info.run_id)

    def finish(self) -> None:
        import mlflow

        mlflow.end_run()


TRACKERS: dict[str, type[Tracker]] = {kind.title: kind for kind in (Wandb, SwanLab, MLflow)}


def writers(report_to: Sequence[str], output_dir: Path, every: int, name: str, logging_dir: str) -> list[Scalars]:
    """The writers that ``report_to`` names.

    Args:
        every: optimiser steps between two that are written.
        name: of the run; "": that of ``output_dir``.
        logging_dir: of TensorBoard's files; "": a folder in ``output_dir``.
    """
    found: list[Scalars] = []
    for report in report_to:
        if report == "tensorboard":
            found.append(TensorBoard(Path(logging_dir or output_dir / "tensorboard"), every))
        else:
            found.append(TRACKERS[report](output_dir, every, name or output_dir.absolute().name))
    return found
