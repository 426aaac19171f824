"""The one function that trains: for the command line, the Python interface and MindFormers' backend."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mindspore as ms

from lora_ms import saving, storage
from lora_ms.adapters.methods.training import rate_factors
from lora_ms.data.loader import DataPlan
from lora_ms.errors import WriteError
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes.outputs import DATA_REPORT, adapter_line
from lora_ms.runtime.device import Runtime, barrier, memory_share
from lora_ms.runtime.graph_cache import remember_seconds, seconds_of
from lora_ms.text import counted, listed
from lora_ms.train import checkpoint
from lora_ms.train.adaptive import MemoryMonitor
from lora_ms.train.callbacks import EarlyStopping, TrainerCallback
from lora_ms.train.checkpoint import Weights
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.expected import StepTimes, duration
from lora_ms.train.hooks import StepHook
from lora_ms.train.loop import Outcome, TrainingLoop
from lora_ms.train.profile import Profiling
from lora_ms.train.report import Reporter
from lora_ms.train.settings import TrainSettings
from lora_ms.train.signals import StopSignal
from lora_ms.train.steps import Steps
from lora_ms.train.tensorboard import Summaries
from lora_ms.train.trackers import writers


class PreparedRun(Protocol):
    """A run that is ready for its first step: of our own loop (``NativeRun``), or of MindFormers' trainer."""

    settings: TrainSettings
    runtime: Runtime

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""

    def begin(self) -> None:
        """Prepares the output folder for this run, and tells the user what begins."""

    def train(self) -> Outcome:
        """Takes all steps, or those until the user stops it."""

    def weights(self) -> Weights | None:
        """The writer of what was trained; None where it cannot be written, and then ``closing_lines`` say why."""

    def end(self) -> None:
        """Called once everything is written, also after a stop."""

    def closing_lines(self) -> list[str]:
        """What the user is told after the loss: of evaluations, and where the results are."""


def train(run: PreparedRun) -> Outcome:
    """Trains, and writes what was trained into ``output_dir``.

    Raises:
        LoraMsError: nothing to train, a loss that is not finite, or a checkpoint that does not fit.
        WriteError: ``output_dir`` cannot be written at the end; the error says where the results are.
    """
    run.begin()
    outcome = run.train()
    weights = None if outcome.stopped and outcome.saved else run.weights()
    unwritten = None
    if weights is not None:
        weights.collect()
        if run.runtime.is_main:
            unwritten = write_results(run.settings.output_dir / weights.folder, weights.finish or weights.write)
    run.end()
    if unwritten is not None:
        raise unwritten
    return outcome


def write_results(folder: Path, fill: Callable[[Path], None]) -> WriteError | None:
    """Writes what was trained into ``folder``, or else into a new one elsewhere, which the error names that is
    returned then.

    Raises:
        WriteError: it cannot be written anywhere.
    """
    with StopSignal():  # nothing is lost to a signal now
        try:
            with saving.new_folder(folder, own=True) as part:
                fill(part)
            return None
        except WriteError as error:
            failed = error
        name = f"lora_ms_{folder.name}_{time.strftime('%Y%m%d_%H%M%S')}"
        for parent in (Path(), Path.home(), Path(tempfile.gettempdir())):
            with suppress(WriteError), saving.new_folder(parent / name, own=True) as part:
                fill(part)
            if (parent / name).is_dir():
                return WriteError(f"{failed}; what was trained is in {(parent / name).absolute()} instead")
        raise failed


def closing_lines(run: PreparedRun, outcome: Outcome) -> list[str]:
    """What the user is told at the end of a run."""
    if outcome.stopped and not outcome.saved:
        return [
            f"stopped after step {outcome.steps:,} of {run.total_steps:,}; its checkpoint could not be written",
            f"the weights are in {run.settings.output_dir}: to train on with them, give them as --load_adapter",
        ]
    if outcome.stopped:
        return [
            f"stopped after step {outcome.steps:,} of {run.total_steps:,}, and saved",
            "to go on, give the same command with --resume_training True",
        ]
    lines = [f"stopped early: {outcome.reason}"] if outcome.reason else []
    loss = f"loss {outcome.first_loss:.4f} -> {outcome.last_loss:.4f} in" if outcome.losses else "nothing left of"
    now = f", {len(outcome.losses):,} of them now" if run.settings.resume else ""
    return [*lines, f"{loss} {counted(outcome.steps, 'step')}{now}", *run.closing_lines()]


class NativeRun:
    """A run of our own training loop on a model of ours.

    Args:
        weights: how what is trained is written and read.
        hooks: what the adapter's method, or further terms of the loss, add to every step.
        row_terms, comparison: of the loss, what depends on the rows; see ``Steps``.
        evaluator: of the held-out rows; None for none.
        callbacks: called at every point of the run, besides those that ``settings`` ask for.
    """

    def __init__(
        self,
        model: CausalLM,
        plan: DataPlan,
        settings: TrainSettings,
        runtime: Runtime,
        weights: Weights,
        *,
        hooks: Sequence[StepHook] = (),
        row_terms: Sequence[Any] = (),
        comparison: Any = None,
        evaluator: Evaluator | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.plan = plan
        self.settings = settings
        self.runtime = runtime
        monitor = None
        if settings.adaptive_batch:
            monitor = MemoryMonitor(plan.levels, partial(memory_share, runtime.device, settings.memory_budget_mb))
        ratio = settings.loraplus_lr_ratio
        factors = {}
        if ratio != 1:
            factors = rate_factors(model, ratio, settings.loraplus_lr_embedding / (settings.learning_rate or 1.0))
        steps = Steps(
            model,
            plan,
            settings,
            runtime,
            vocab_size=model.config.vocab_size,
            loss_scaling=settings.loss_scaling if model.dtype == ms.float16 else None,
            hooks=hooks,
            row_terms=row_terms,
            comparison=comparison,
            rate_factors=factors,
        )
        sizes = [parameter.size for parameter in model.get_parameters()]
        self.likeness = (  # of runs that take as long for a token
            f"1,000 tokens {len(sizes)} parameters, {sum(sizes)}, {len(steps.trainable)} train, {model.dtype} "
            f"{settings.recompute} {runtime.device} {runtime.operators.name} {runtime.world}"
        )
        times = StepTimes(lambda seconds: remember_seconds(self.likeness, 1000 * seconds / plan.cost()))
        self.loop = TrainingLoop(steps, weights, evaluator, [*callbacks_of(settings), *callbacks, times], monitor)

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    def begin(self) -> None:
        """Finds the checkpoint to resume from, or removes those of an earlier run."""
        output_dir = self.settings.output_dir
        if self.runtime.is_main:
            checkpoint.recover(output_dir)
            if self.settings.overwrite:
                checkpoint.remove_foreign(output_dir)
            checkpoint.check_foreign(output_dir)
        self.loop.check_ranks()  # the others wait here for the main one
        if self.settings.resume:
            self.loop.restore(checkpoint.find(output_dir, self.settings.resume))
        elif self.runtime.is_main:
            old = checkpoint.clear(output_dir)
            if old:
                print(f"removed the checkpoints of an earlier run: {', '.join(old)}")
        if self.runtime.is_main:
            plan = self.plan
            start = self.loop.state.step
            try:
                storage.write_json(output_dir / DATA_REPORT, plan.reports)
            except WriteError as error:
                print(f"warning: {error}; the run goes on")
            print(
                f"training: {counted(plan.total_steps, 'step')}, {counted(plan.per_step, 'row')} each, "
                f"{plan.steps_per_epoch:,} per epoch" + (f", from step {start:,}" if start else "")
            )
            shapes = [f"{shape.lines} x {shape.length:,}" for shape in plan.shapes_used()]
            print(
                f"{counted(len(shapes), 'batch shape')}, compiled when first used: "
                f"{listed(shapes, separator=', ')} tokens",
                flush=True,
            )
            known = seconds_of(self.likeness)
            if known and start < plan.total_steps:
                seconds = known * plan.cost() / 1000
                left = duration(seconds * (plan.total_steps - start))
                print(f"about {left} to go, at {seconds:.2g} s a step as in the last run with this model", flush=True)

    def train(self) -> Outcome:
        return self.loop.train()

    def weights(self) -> Weights:
        return self.loop.weights

    def end(self) -> None:
        if self.runtime.world > 1:
            barrier()

    def closing_lines(self) -> list[str]:
        output_dir = self.settings.output_dir
        lines = []
        if self.loop.evaluator is not None and self.settings.keep_best:
            lines.append(f"weights of the best evaluation: {output_dir / checkpoint.BEST}")
        return [*lines, adapter_line(output_dir, self.loop.weights.folder)]


def callbacks_of(settings: TrainSettings) -> list[TrainerCallback]:
    """The callbacks that the settings ask for."""
    output_dir = settings.output_dir
    found: list[TrainerCallback] = [Reporter(settings.logging_steps)]
    found += writers(settings.report_to, output_dir, settings.logging_steps, settings.run_name, settings.logging_dir)
    if settings.summary_steps:
        folder = Path(settings.summary_dir) if settings.summary_dir else output_dir / "summary"
        found.append(Summaries(folder, settings.summary_steps))
    if settings.profile_steps is not None:
        folder = Path(settings.profile_dir) if settings.profile_dir else output_dir / "profile"
        found.append(Profiling(folder, *settings.profile_steps))
    if settings.patience:
        found.append(EarlyStopping(settings.patience))
    return found
