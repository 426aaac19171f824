"""The loop around the training step: feeds batches, reads losses, reports, saves, stops when asked to."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from lora_ms.data.feed import Step, feed
from lora_ms.data.loader import DataPlan
from lora_ms.errors import LoraMsError
from lora_ms.nn.noise import EmbeddingNoise
from lora_ms.runtime import Runtime, SumOverRanks, peak_memory_mb
from lora_ms.train import checkpoint
from lora_ms.train.optim import FlatAdamW, learning_rate, loraplus_factors
from lora_ms.train.report import Record, Reporter
from lora_ms.train.settings import TrainSettings
from lora_ms.train.step import MicroStep, SummedLoss

MAX_SKIPPED = 50  # float16 steps in a row that may overflow before the run is given up


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int  # optimiser steps done in all, those before a resume included
    stopped: bool  # by Ctrl-C or SIGTERM, before its end
    losses: list[float]  # of the steps that this run did

    @property
    def first_loss(self) -> float:
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        return self.losses[-1]


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the step under way is finished and saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.seen = False

    def _note(self, number, frame) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Companion(Protocol):
    """What goes along with the steps of a run, such as AdaLoRA's rank allocator."""

    def cells(self, params: list[Parameter]) -> tuple[nn.Cell | None, nn.Cell | None]:
        """``FlatAdamW``'s penalty and observer for the trainable parameters."""

    def after_step(self, step: int) -> None:
        """Called when optimiser step ``step`` (from 0) is on the device."""


@dataclass
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    losses: list[Tensor]
    norm: Tensor
    finite: Tensor
    tokens: int
    label_tokens: int
    learning_rate: float


class Run:
    """One training run of ``model`` on ``plan``.

    Args:
        model: a Cell with ``hidden_states(input_ids, position_ids, rows)`` and ``head_weight()``, to be trained.
        vocab_size: rows of the head.
        half: whether the model computes in float16, and so needs a loss scale.
        write_weights: writes what was trained into a directory.
        identity: what a checkpoint must also share with the run that goes on from it.
        companion: takes part in every step; None for most.
    """

    def __init__(
        self,
        model: nn.Cell,
        plan: DataPlan,
        settings: TrainSettings,
        runtime: Runtime,
        vocab_size: int,
        half: bool,
        write_weights: Callable[[Path], None],
        identity: Mapping[str, object],
        companion: Companion | None = None,
    ):
        self.plan, self.settings, self.runtime, self.write_weights = plan, settings, runtime, write_weights
        s = settings
        trainable = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
        params = list(trainable.values())
        self.identity = {**identity, "trainable": sorted(trainable)}
        if any(p.dtype != ms.float32 for p in params):
            raise LoraMsError("all parameters train in float32 only: set compute_dtype to float32, or give pet_config")
        if not params:
            raise LoraMsError("no parameter is trainable: give pet_config, or set it to null to train all parameters")
        factors = None
        if s.loraplus_lr_ratio != 1:
            embedding = s.loraplus_lr_embedding / (s.learning_rate or 1.0)
            factors = loraplus_factors(model, params, s.loraplus_lr_ratio, embedding)
        self.companion = companion
        penalty, observer = (None, None) if companion is None else companion.cells(params)
        self.optimizer = FlatAdamW(
            params,
            s.betas,
            s.eps,
            s.weight_decay,
            s.max_grad_norm,
            s.loss_scale if half else 1.0,
            half and s.dynamic_scale,
            s.scale_window,
            s.scale_factor,
            SumOverRanks() if runtime.world > 1 else None,
            factors,
            penalty,
            observer,
        )
        self.sum_over_ranks = SumOverRanks() if runtime.world > 1 else None
        self.half, self.skipped = half, 0
        self.noise = EmbeddingNoise(model.model, s.neftune_noise_alpha) if s.neftune_noise_alpha else None
        model.set_train(True)
        if s.recompute:
            for layer in model.model.layers:
                layer.recompute()
        self.micro_step = MicroStep(SummedLoss(model, vocab_size), self.optimizer)
        self.pending: list[_Pending] = []
        self.clock = self.waited = 0.0
        self.steps: Iterator[Step] = iter(())

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        s = self.settings
        total = s.schedule_steps if s.schedule_steps > 0 else self.plan.total_steps
        warmup = s.warmup_steps or int(total * s.warmup_ratio)
        return learning_rate(step, total, s.learning_rate, s.lr_kind, warmup, s.lr_end)

    def fingerprint(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        p = self.plan
        return {
            "rows": len(p.rows),
            "rows_per_step": p.per_step,
            "layout": p.layout.kind,
            "seed": self.settings.seed,
            "shuffle": self.settings.shuffle,
            "tokens_crc32": p.checksum(),
            **p.order.identity(),
            "neftune_noise_alpha": self.settings.neftune_noise_alpha,
            **self.identity,
        }

    def gradient(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Adds the gradient of a micro-batch's loss to the optimiser's; returns the loss []."""
        with nullcontext() if self.noise is None else self.noise.on(batch[0].shape[1]):
            return self.micro_step(*batch)

    def launch(self, step: int) -> None:
        """Puts optimiser step ``step`` (from 0) on the device; its numbers are read by ``read``."""
        begun = time.perf_counter()
        batches, tokens, label_tokens = next(self.steps)
        self.waited += time.perf_counter() - begun
        losses = [self.gradient(batch) for batch in batches]
        rate = self.rate(step)
        norm, finite = self.optimizer(Tensor(rate, ms.float32), Tensor(label_tokens, ms.float32))
        if self.companion is not None:
            self.companion.after_step(step)
        self.pending.append(_Pending(step, losses, norm, finite, tokens, label_tokens, rate))

    def read(self) -> list[Record]:
        """Waits for the pending steps and returns their records.

        Raises:
            LoraMsError: a loss or gradient that is not finite; no parameter was changed by it.
        """
        pending, self.pending = self.pending, []
        sums = [sum(float(loss.asnumpy()) for loss in p.losses) for p in pending]
        if self.sum_over_ranks is not None:
            sums = self.sum_over_ranks(Tensor(np.array(sums, np.float32))).asnumpy().tolist()
        norms = [float(p.norm.asnumpy()) for p in pending]
        seconds, now = (time.perf_counter() - self.clock) / len(pending), time.perf_counter()
        self.clock = now
        waited, self.waited = self.waited / len(pending), 0.0
        records = []
        for p, total, norm in zip(pending, sums, norms, strict=True):
            self._check_finite(p, total)
            records.append(
                Record(
                    step=p.step + 1,
                    epoch=round(self.plan.epoch_of(p.step + 1), 4),
                    loss=total / p.label_tokens,
                    grad_norm=norm if np.isfinite(norm) else None,
                    learning_rate=p.learning_rate,
                    tokens=p.tokens,
                    label_tokens=p.label_tokens,
                    tokens_per_second=round(p.tokens / seconds, 1),
                    step_time_s=round(seconds, 4),
                    wait_share=round(waited / seconds, 4),
                    peak_memory_mb=round(peak_memory_mb(self.runtime.device), 1),
                )
            )
        return records

    def _any_rank(self, seen: bool) -> bool:
        # all ranks stop after the same step, or those left would wait for ever
        if self.sum_over_ranks is None:
            return seen
        return bool(self.sum_over_ranks(Tensor([float(seen)], ms.float32)).asnumpy()[0])

    def _check_finite(self, p: _Pending, loss: float) -> None:
        if bool(p.finite.asnumpy()) and np.isfinite(loss):
            self.skipped = 0
            return
        rows = [self.plan.rows.where(i) for i in self.plan.step_rows(p.step)]
        named = f"step {p.step + 1} (rows {', '.join(rows[:4])}{' …' if len(rows) > 4 else ''})"
        if not np.isfinite(loss):
            raise LoraMsError(f"the loss of {named} is {loss}; no weight was changed by it: lower the learning rate")
        self.skipped += 1
        if not self.half or self.skipped > MAX_SKIPPED:
            raise LoraMsError(f"the gradient of {named} is not finite; no weight was changed: lower the learning rate")

    def save(self, step: int) -> None:
        """Checkpoint after ``step`` steps; by the main rank."""
        if self.runtime.is_main:
            s = self.settings
            checkpoint.save(
                s.output_dir, step, self.optimizer, self.fingerprint(), self.write_weights, s.keep_checkpoint_max
            )

    def train(self, start: int = 0) -> Outcome:
        """From optimiser step ``start`` to the end, or to the first Ctrl-C."""
        s, total = self.settings, self.plan.total_steps
        reporter = Reporter(s.output_dir, start, total, s.logging_steps, self.runtime.is_main)
        save_steps = self.plan.steps_per_epoch if s.save_steps < 0 else s.save_steps
        losses: list[float] = []
        done = start
        sink = s.sink_size if s.sink_size > 0 else self.plan.steps_per_epoch
        self.clock = time.perf_counter()
        self.steps = feed(self.plan, start)
        try:
            with StopSignal() as stop:
                stopping = False
                while done < total and not stopping:
                    self.launch(done)
                    done += 1
                    stopping = self._any_rank(stop.seen)
                    due = bool(save_steps) and done % save_steps == 0
                    if len(self.pending) >= sink or due or done == total or stopping:
                        for record in self.read():
                            losses.append(record.loss)
                            reporter.show(record)
                    if due or (stopping and done < total):
                        self.save(done)
        finally:
            reporter.close()
            self.steps = iter(())
        return Outcome(done, done < total, losses)
