"""The optimiser steps of a run: feeds batches to the device, and reads its numbers."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from lora_ms.adapters.methods.training import dropouts, rate_factors
from lora_ms.data.example import DeviceStep
from lora_ms.data.loader import DataPlan, device_steps
from lora_ms.errors import LoraMsError
from lora_ms.nn.dropout import Draws, DrawTable
from lora_ms.nn.noise import EmbeddingNoise
from lora_ms.runtime.device import Runtime, peak_memory_mb
from lora_ms.train import groups
from lora_ms.train.callbacks import Companion, Record
from lora_ms.train.optimizer import FlatAdamW, learning_rate
from lora_ms.train.settings import TrainSettings
from lora_ms.train.step import SummedLoss, micro_step

MAX_SKIPPED = 50  # float16 steps in a row that may overflow before the run is given up


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


class Steps:
    """The optimiser steps of ``model`` on ``plan``.

    Args:
        model: a Cell with ``hidden_states(input_ids, position_ids, rows)``, ``head_weight()`` and ``operators``, to be
            trained.
        vocab_size: rows of the head.
        half: whether the model computes in float16, and so needs a loss scale.
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
        companion: Companion | None = None,
    ):
        self.model, self.plan, self.settings, self.runtime = model, plan, settings, runtime
        self.companion, self.half, self.skipped = companion, half, 0
        s = settings
        trainable = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
        params = list(trainable.values())
        self.trainable = sorted(trainable)
        if any(p.dtype != ms.float32 for p in params):
            raise LoraMsError("all parameters train in float32 only: set compute_dtype to float32, or give pet_config")
        if not params:
            raise LoraMsError("no parameter is trainable: give pet_config, or set it to null to train all parameters")
        factors, decays = groups.rates_and_decays(trainable, s.groups, s.learning_rate, s.weight_decay)
        if s.groups and runtime.is_main:
            print(*groups.describe(trainable, s.groups, s.learning_rate, s.weight_decay), sep="\n")
        if s.loraplus_lr_ratio != 1:
            embedding = s.loraplus_lr_embedding / (s.learning_rate or 1.0)
            plus = rate_factors(model, params, s.loraplus_lr_ratio, embedding)
            factors = [factor * more for factor, more in zip(factors, plus, strict=True)]
        penalty = next(iter(companion.objectives(params)), None) if companion is not None else None
        observer = companion.observer(params) if companion is not None else None
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
            runtime.data_sum(),
            factors,
            decays,
            penalty,
            observer,
            runtime.shard,
            s.swap,
            model.operators,
        )
        self.sum_over_data = runtime.data_sum()
        self.noise = EmbeddingNoise(model.model, s.neftune_noise_alpha) if s.neftune_noise_alpha else None
        self.table = self._table(model)
        model.set_train(True)
        self.micro_step = micro_step(SummedLoss(model, vocab_size, runtime.shard), self.optimizer, s.recompute)
        self.pending: list[_Pending] = []
        self.clock = self.waited = 0.0
        self.upcoming: Iterator[DeviceStep] = iter(())

    def _table(self, model: nn.Cell) -> DrawTable | None:
        """Where dropout and noise take their random numbers from, so that a resumed run meets the same ones."""
        shard = self.runtime.shard
        draws: list[Draws] = []
        columns = []
        for path, parameter, dropout in dropouts(model):
            # a process that has some of the columns takes its part of one process's numbers
            shape = shard.whole_shape(path, tuple(parameter.shape))
            dropout.draws.first = shard.place(path, shape)[1].start or 0
            draws.append(dropout.draws)
            columns.append(shape[1])
        if self.noise is not None:
            draws.append(self.noise.noisy.draws)
            columns.append(self.noise.plain.weight.shape[1])
        if not draws:
            return None
        rows = max(max(shape.lines * shape.length, shape.capacity) for shape in self.plan.layout.shapes)
        return DrawTable(draws, rows, max(columns), self.settings.seed)

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        s = self.settings
        return learning_rate(step, self._schedule_steps, s.learning_rate, s.lr_kind, self._warmup_steps, s.lr_end)

    @property
    def _schedule_steps(self) -> int:
        s = self.settings
        return s.schedule_steps if s.schedule_steps > 0 else self.plan.total_steps

    @property
    def _warmup_steps(self) -> int:
        s = self.settings
        return s.warmup_steps or int(self._schedule_steps * s.warmup_ratio)

    @cached_property  # every checkpoint asks, and it reads all tokens
    def identity(self) -> dict:
        """What decides the numbers of the steps."""
        p, s = self.plan, self.settings
        return {
            "rows": len(p.rows),
            "rows_per_step": p.per_step,
            "layout": p.layout.kind,
            "tokens_crc32": p.checksum(),
            **p.order.identity(),
            **s.identity(),
            "warmup_steps": self._warmup_steps,
            "schedule_steps": None if s.lr_kind == "constant" else self._schedule_steps,
            "float16": self.half,
            "trainable": self.trainable,
        }

    def begin(self, step: int, level: int = 0) -> None:
        """The next step to be launched is ``step`` (from 0); level: of its micro-batches, see ``DataPlan.step``."""
        self.upcoming = device_steps(self.plan, step, level)
        self.clock = time.perf_counter()

    def pause(self, begun: float) -> None:
        """Leaves the time since ``begun``, which other work took, out of the steps'."""
        self.clock += time.perf_counter() - begun

    def close(self) -> None:
        """No more steps."""
        self.upcoming = iter(())
        if self.table is not None:
            self.table.close()

    def gradient(self, batch: tuple[Tensor, ...], step: int, number: int) -> Tensor:
        """Adds the gradient of a micro-batch's loss to the optimiser's; returns the loss [].

        number: the micro-batch's, among those of this rank.
        """
        if self.table is not None:
            self.table.fill(step, self.plan.rank + number * self.plan.world)
        with nullcontext() if self.noise is None else self.noise.on(batch[0].shape[1]):
            self.micro_step.prepare(*batch)
            return self.micro_step(*batch)

    def launch(self, step: int) -> None:
        """Puts optimiser step ``step`` (from 0) on the device; its numbers are read by ``read``."""
        begun = time.perf_counter()
        batches, tokens, label_tokens = next(self.upcoming)
        self.waited += time.perf_counter() - begun
        losses = [self.gradient(batch, step, number) for number, batch in enumerate(batches)]
        rate = self.rate(step)
        norm, finite = self.optimizer(Tensor(rate, ms.float32), Tensor(label_tokens, ms.float32))
        if self.companion is not None:
            self.companion.after_step(step)
        self.pending.append(_Pending(step, losses, norm, finite, tokens, label_tokens, rate))

    def read(self) -> list[Record]:
        """Waits for the pending steps, and returns their numbers.

        Raises:
            LoraMsError: a loss or gradient that is not finite; no parameter was changed by it.
        """
        pending, self.pending = self.pending, []
        sums = [sum(float(loss.asnumpy()) for loss in p.losses) for p in pending]
        if self.sum_over_data is not None:
            sums = self.sum_over_data(Tensor(np.array(sums, np.float32))).asnumpy().tolist()
        norms = [float(p.norm.asnumpy()) for p in pending]
        seconds, now = (time.perf_counter() - self.clock) / len(pending), time.perf_counter()
        self.clock = now
        waited, self.waited = self.waited / len(pending), 0.0
        records = []
        for p, total, norm in zip(pending, sums, norms, strict=True):
            self._check_finite(p, total)
            record = Record(
                step=p.step + 1,
                epoch=round(self.plan.epoch_of(p.step + 1), 4),
                loss=total / p.label_tokens if np.isfinite(total) else None,
                grad_norm=norm if np.isfinite(norm) else None,
                learning_rate=p.learning_rate,
                tokens=p.tokens,
                label_tokens=p.label_tokens,
                tokens_per_second=round(p.tokens / seconds, 1),
                step_time_s=round(seconds, 4),
                wait_share=round(waited / seconds, 4),
                peak_memory_mb=round(peak_memory_mb(self.runtime.device), 1),
            )
            records.append(record)
        return records

    def _check_finite(self, p: _Pending, loss: float) -> None:
        if bool(p.finite.asnumpy()) and np.isfinite(loss):
            self.skipped = 0
            return
        self.skipped += 1
        if self.half and self.skipped <= MAX_SKIPPED:
            return
        rows = [self.plan.rows.where(i) for i in self.plan.step_rows(p.step)]
        named = f"step {p.step + 1} (rows {', '.join(rows[:4])}{' …' if len(rows) > 4 else ''})"
        what = "gradient" if np.isfinite(loss) else "loss"
        value = "not finite" if np.isfinite(loss) else f"{loss}"
        often = f", as in the {MAX_SKIPPED} steps before" if self.half else ""
        raise LoraMsError(
            f"the {what} of {named} is {value}{often}; no weight was changed by it: lower the learning rate, or look "
            "at these rows"
        )
