"""The loop around the training step: reads losses, evaluates, saves, stops when asked to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor

from lora_ms import saving
from lora_ms.errors import LoraMsError, WriteError
from lora_ms.nn.parallel import SumOverRanks
from lora_ms.runtime.graph_cache import announcing
from lora_ms.train import checkpoint
from lora_ms.train.adaptive import HIGH, LOW, MemoryMonitor
from lora_ms.train.agreement import check_agreement, code_digest
from lora_ms.train.callbacks import RunState, TrainerCallback
from lora_ms.train.checkpoint import Weights
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.signals import StopSignal
from lora_ms.train.steps import Steps

KEPT_STATE = ("best_step", "best_loss", "worse")  # of RunState, in a checkpoint


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int  # optimiser steps done in all, those before a resume included
    stopped: bool  # by Ctrl-C, SIGTERM or SIGHUP, before its end
    losses: list[float]  # of the steps that this run did; those that overflowed in float16 left out
    reason: str = ""  # why a callback ended it before its last step
    saved: bool = True  # where it was stopped: whether its checkpoint was written

    @property
    def first_loss(self) -> float:
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        return self.losses[-1]


class TrainingLoop:
    """One training run: the optimiser steps, and what happens between them.

    Args:
        weights: how what was trained goes to a directory.
        evaluator: of the held-out rows; None for none.
        callbacks: called at every point of the run, in this order.
        monitor: of memory, by which micro-batches get smaller and larger; None: they stay as they are.
    """

    def __init__(
        self,
        steps: Steps,
        weights: Weights,
        evaluator: Evaluator | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        monitor: MemoryMonitor | None = None,
    ):
        self.steps = steps
        self.weights = weights
        self.plan = steps.plan
        self.settings = steps.settings
        self.runtime = steps.runtime
        self.evaluator = evaluator
        self.callbacks = callbacks
        self.monitor = monitor
        self.state = RunState(
            steps.model,
            output_dir=self.settings.output_dir,
            total_steps=self.plan.total_steps,
            is_main=self.runtime.is_main,
        )
        self.sum_over_ranks = SumOverRanks() if self.runtime.world > 1 else None
        self.losses: list[float] = []
        self.saved = True  # whether the last checkpoint that was due was written

    def fingerprint(self) -> dict:
        """What a checkpoint must share with the run that goes on from it: all that decides its numbers."""
        return {**self.steps.identity, **self.weights.identity}

    def restore(self, path: Path) -> None:
        """Goes on from checkpoint ``path``.

        Raises:
            LoraMsError: it is damaged, of a run with other settings, or beyond the last step.
        """
        stored = checkpoint.load(path, self.steps.optimizer, self.fingerprint())
        if stored["step"] > self.plan.total_steps:
            raise LoraMsError(
                f"{path}: {stored['step']:,} steps are done there, and this run has {self.plan.total_steps:,}: raise "
                "max_steps or epochs"
            )
        self.weights.read(path)
        self.state.step = stored["step"]
        for name in KEPT_STATE:
            setattr(self.state, name, stored[name])
        self.steps.skipped = stored["skipped"]
        if self.sum_over_ranks is not None:
            check_agreement({"the checkpoint's step": stored["step"]}, self.sum_over_ranks, self.runtime.world)

    def report(self) -> None:
        """Waits for the pending steps, and tells the callbacks.

        Raises:
            LoraMsError: a loss or gradient that is not finite; no parameter was changed by it.
        """
        for record in self.steps.read():
            if record.loss is not None:
                self.losses.append(record.loss)
            self.tell("on_step_end", record)

    def tell(self, point: str, *args: Any) -> None:
        """Calls the callbacks; what happens there is not part of a step's time."""
        begun = time.perf_counter()
        for callback in self.callbacks:
            getattr(callback, point)(self.state, *args)
        self.steps.pause(begun)

    def _any_rank(self, seen: bool) -> bool:
        # all ranks stop after the same step, or those left would wait for ever
        if self.sum_over_ranks is None:
            return seen
        return bool(self.sum_over_ranks(Tensor([float(seen)], ms.float32)).asnumpy()[0])

    def check_ranks(self) -> None:
        """Raises LoraMsError where the processes of the run differ in what all of them must share; each calls it."""
        if self.sum_over_ranks is None:
            return
        values = self.settings.shared() | self.fingerprint()
        values["model_parallel"] = self.runtime.shard.count
        values["do_eval"] = self.evaluator is not None
        values["eval_tokens_crc32"] = self.evaluator.plan.checksum() if self.evaluator is not None else None
        check_agreement(values, self.sum_over_ranks, self.runtime.world, code_digest())

    def save(self) -> None:
        """Checkpoint of the steps done: all ranks call it, the main one writes; where it cannot, the run goes on."""
        begun = time.perf_counter()
        optimizer = self.steps.optimizer.whole_state()
        self.weights.collect()
        if not self.runtime.is_main:
            return
        kept = {name: getattr(self.state, name) for name in KEPT_STATE}
        folder = self.settings.output_dir
        try:
            path = checkpoint.save(
                folder,
                self.state.step,
                optimizer=optimizer,
                state={**self.fingerprint(), **kept, "skipped": self.steps.skipped},
                write_weights=self.weights.write,
                keep=self.settings.keep_checkpoint_max,
            )
        except WriteError as error:
            last = [found.name for found in checkpoint.list_checkpoints(folder)][-1:]
            kept_one = last[0] if last else "none"
            self.tell("on_notice", f"warning: {error}; the run goes on, and its last checkpoint is {kept_one}")
            self.saved = False
            return
        finally:
            self.steps.pause(begun)
        self.saved = True
        self.tell("on_save", path)

    def evaluate(self) -> None:
        """Scores the held-out rows, and keeps the weights where they are the best so far."""
        self.tell("on_evaluation_due")
        if self.evaluator is None:
            return
        begun = time.perf_counter()
        state = self.state
        found = self.evaluator.evaluate(state.step, self.plan.epoch_of(state.step), state.best_loss)
        if found.best:
            state.best_step = state.step
            state.best_loss = found.eval_loss
            state.worse = 0
        else:
            state.worse += 1
        if found.best and self.settings.keep_best:
            self.weights.collect()
            if self.runtime.is_main:
                self._keep_best()
        self.steps.pause(begun)
        self.tell("on_evaluate", found)

    def _keep_best(self) -> None:
        try:
            with saving.new_folder(self.settings.output_dir / checkpoint.BEST, own=True) as part:
                self.weights.write(part)
        except WriteError as error:
            self.tell("on_notice", f"warning: {error}; the run goes on")

    def adapt(self) -> None:
        """Makes the micro-batches of the next steps smaller or larger, where memory asks for it."""
        if self.monitor is None:
            return
        before = self.monitor.level
        share = self.monitor.used()
        little = not self._any_rank(share >= LOW)
        level = self.monitor.next_level(self._any_rank(share > HIGH), little)
        if level != before:
            self.steps.begin(self.state.step, level)
            self.tell(
                "on_notice", f"{share:.0%} of the memory is in use: micro-batches are now 1/{2**level} of full size"
            )

    def _due(self, every: int) -> bool:
        # steps between two saves or evaluations; 0: never, -1: an epoch
        every = self.plan.steps_per_epoch if every < 0 else every
        return bool(every) and self.state.step % every == 0

    def train(self) -> Outcome:
        """From the steps that are done to the end, or to the first Ctrl-C."""
        state, total = self.state, self.plan.total_steps
        stopped = False
        self.steps.begin(state.step, 0 if self.monitor is None else self.monitor.level)
        self.tell("on_train_begin")
        try:
            with StopSignal() as stop, announcing(lambda line: self.tell("on_notice", line)):
                while state.step < total and not state.reason and not stopped:
                    self.steps.launch(state.step)
                    state.step += 1
                    stopped = self._any_rank(stop.seen)
                    self._between_steps(stopped)
        finally:
            self.tell("on_train_end")
            self.steps.close()
        stopped = stopped and state.step < total
        saved = not (stopped and self._any_rank(not self.saved))
        return Outcome(state.step, stopped, self.losses, state.reason, saved)

    def _between_steps(self, stopped: bool) -> None:
        """Does what is due after a step. stopped: whether a signal has asked for the end of the run."""
        s, state = self.settings, self.state
        sink = s.sink_size if s.sink_size > 0 else self.plan.steps_per_epoch
        last = state.step == self.plan.total_steps
        save = self._due(s.save_steps)
        score = self._due(s.eval_steps) or self._due(s.eval_epochs * self.plan.steps_per_epoch)
        if len(self.steps.pending) >= sink or save or score or last or stopped:
            self.report()
            if score:
                self.evaluate()
            if self._any_rank(bool(state.reason)):
                state.stop("another process of the run stopped it")
            self.adapt()
        if (last or state.reason) and not score:
            self.evaluate()
        if save or (stopped and not last):
            self.save()
