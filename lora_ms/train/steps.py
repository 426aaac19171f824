"""The optimiser steps of a run: feeds batches to the device, and reads its numbers."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from lora_ms.data.example import DeviceStep
from lora_ms.data.loader import DataPlan, device_steps
from lora_ms.errors import LoraMsError
from lora_ms.nn.dropout import Draws, DrawTable, DropoutKernel
from lora_ms.nn.noise import EmbeddingNoise
from lora_ms.runtime.device import Runtime, peak_memory_mb
from lora_ms.train import groups
from lora_ms.train.callbacks import StepRecord
from lora_ms.train.gradient import MicroStep
from lora_ms.train.hooks import StepHook
from lora_ms.train.objectives import CROSS_ENTROPY, term_names
from lora_ms.train.optimizer import FlatAdamW, LossScaling
from lora_ms.train.parts import SummedLoss, check_float32
from lora_ms.train.schedule import learning_rate
from lora_ms.train.settings import TrainSettings

MAX_SKIPPED = 50  # float16 steps in a row that may overflow before the run is given up


@dataclass
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    losses: list[Tensor]  # of each micro-batch, what ``SummedLoss`` gives
    norm: Tensor
    finite: Tensor
    terms: Sequence[Tensor]  # values of the extra terms of the loss
    tokens: int
    label_tokens: int
    learning_rate: float


class Steps:
    """The optimiser steps of ``model`` on ``plan``.

    Args:
        model: as ``models.decoder.CausalLM``, to be trained.
        vocab_size: rows of the head.
        loss_scaling: None for a model that computes in float32.
        hooks: parts of the run that take part in every step.
        rate_factors: by path, what the learning rate of a parameter is multiplied by (LoRA+); 1 where it is not named.
        row_terms: further terms of the loss that depend on the rows, as ``SummedLoss`` takes them; in the order of
            ``plan.terms``.
        comparison: what takes the cross-entropy's place, as ``SummedLoss`` takes it; the only one of ``plan.terms`` is
            its rows then.

    Raises:
        LoraMsError: nothing to train, or something that does not train in float32.
    """

    def __init__(
        self,
        model: nn.Cell,
        plan: DataPlan,
        settings: TrainSettings,
        runtime: Runtime,
        vocab_size: int,
        *,
        loss_scaling: LossScaling | None = None,
        hooks: Sequence[StepHook] = (),
        rate_factors: Mapping[str, float] | None = None,
        row_terms: Sequence[Any] = (),
        comparison: Any = None,
    ):
        self.model = model
        self.row_terms = row_terms
        self.comparison = comparison
        self.plan = plan
        self.settings = settings
        self.runtime = runtime
        self.hooks = hooks
        self.loss_scaling = loss_scaling
        self.skipped = 0  # steps in a row, up to the last, that overflowed
        trainable = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
        self.trainable = sorted(trainable)
        check_float32(trainable.values())
        if not trainable:
            raise LoraMsError("no parameter is trainable: give pet_config, or set it to null to train all parameters")
        self.optimizer = self._optimizer(trainable, rate_factors or {})
        self.sum_over_data = runtime.data_sum()
        alpha = settings.neftune_noise_alpha
        self.noise = EmbeddingNoise(model.model, alpha) if alpha else None
        self.table = self._draw_table()
        model.set_train(True)
        loss = SummedLoss(model, vocab_size, runtime.shard, row_terms, comparison)
        with nullcontext() if self.noise is None else self.noise.on(1):  # it keeps the embedding that it finds
            self.micro_step = MicroStep(loss, self.optimizer, settings.recompute)
        self.pending: list[_Pending] = []
        self.clock = 0.0  # when the steps that are pending began
        self.waited = 0.0  # seconds since then, for data
        self.upcoming: Iterator[DeviceStep] = iter(())

    def _optimizer(self, trainable: Mapping[str, Parameter], rate_factors: Mapping[str, float]) -> FlatAdamW:
        s = self.settings
        params = list(trainable.values())
        factors, decays = groups.rates_and_decays(trainable, s.groups, s.learning_rate, s.weight_decay)
        if s.groups and self.runtime.is_main:
            print(*groups.describe(trainable, s.groups, s.learning_rate, s.weight_decay), sep="\n")
        factors = [factor * rate_factors.get(name, 1.0) for factor, name in zip(factors, trainable, strict=True)]
        objectives = [term for hook in self.hooks for term in hook.objectives(params)]
        observers = [hook.observer(params) for hook in self.hooks]
        all_terms = [*objectives, *self.row_terms]
        named = ", ".join(term.name for term in (*all_terms, self.comparison) if term is not None)
        if named and self.runtime.shard.count > 1:  # a process sees its part of the parameters alone
            raise LoraMsError(
                f"loss terms ({named}) are not supported with parallel_config.model_parallel "
                f"{self.runtime.shard.count}: set it to 1, or leave the terms out"
            )
        if s.eight_bits and self.runtime.shard.count > 1:  # blocks of numbers are not cut where layers are
            raise LoraMsError(
                f"an optimiser with eight bits is not supported with parallel_config.model_parallel "
                f"{self.runtime.shard.count}: set it to 1, or optimizer.type to AdamW"
            )
        if s.paged and not self.model.operators.lends_memory:
            raise LoraMsError(
                "a paged optimiser needs the CPU and its own operators (context.cpu_operators): on a card set "
                "optimizer.swap to True, which keeps the state in the host's memory"
            )
        self.terms = term_names(all_terms, [entry.name for entry in fields(StepRecord)])
        return FlatAdamW(
            params,
            betas=s.betas,
            eps=s.eps,
            weight_decay=decays,
            rate_factors=factors,
            max_grad_norm=s.max_grad_norm,
            loss_scaling=self.loss_scaling,
            objectives=objectives,
            observers=[observer for observer in observers if observer is not None],
            all_reduce=self.runtime.data_sum(),
            shard=self.runtime.shard,
            eight_bits=s.eight_bits,
            swap=s.swap,
            paged_in=s.output_dir if s.paged else None,
            operators=self.model.operators,
        )

    def _draw_table(self) -> DrawTable | None:
        """Where dropout and noise take their random numbers from, so that a resumed run meets the same ones."""
        shard = self.runtime.shard
        draws: list[Draws] = []
        columns: list[int] = []  # of what each is drawn for
        for name, cell in self.model.cells_and_names():
            if isinstance(cell, DropoutKernel) and cell.probability > 0:
                # a rank that has some of a layer's columns takes its part of one rank's numbers
                weight = f"{name.rpartition('.')[0]}.weight"
                width = shard.whole_shape(weight, (1, cell.columns))[1]
                cell.draws.first = shard.slices(weight, (1, width))[1].start or 0
                draws.append(cell.draws)
                columns.append(width)
        if self.noise is not None:
            draws.append(self.noise.noisy.draws)
            columns.append(self.noise.width)
        if not draws:
            return None
        rows = max(max(shape.lines * shape.length, shape.capacity) for shape in self.plan.layout.shapes)
        return DrawTable(draws, rows, max(columns), self.settings.seed)

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        s = self.settings
        return learning_rate(
            step,
            self._schedule_steps,
            s.learning_rate,
            kind=s.lr_kind,
            warmup_steps=self._warmup_steps,
            end=s.lr_end,
        )

    @property
    def _schedule_steps(self) -> int:
        s = self.settings
        return s.schedule_steps if s.schedule_steps > 0 else self.plan.total_steps

    @property
    def _warmup_steps(self) -> int:
        s = self.settings
        steps = self._schedule_steps * s.warmup_ratio
        return s.warmup_steps or (math.ceil(steps) if s.warmup_rounds_up else int(steps))

    @cached_property  # every checkpoint asks, and it reads all tokens
    def identity(self) -> dict:
        """What decides the numbers of the steps."""
        p, s = self.plan, self.settings
        return {
            "rows": len(p),
            "rows_per_step": p.per_step,
            "layout": p.layout.kind,
            "tokens_crc32": p.checksum(),
            **p.order.identity(),
            **s.identity(),
            "warmup_steps": self._warmup_steps,
            "schedule_steps": None if s.lr_kind == "constant" else self._schedule_steps,
            "float16": self.loss_scaling is not None,
            "trainable": self.trainable,
            **({"rows_compared": p.usual_lines} if s.compares_rows else {}),
        }

    def begin(self, step: int, level: int = 0) -> None:
        """Feeds batches from ``step`` (from 0) on; level: how often micro-batches are halved, see ``DataPlan.step``."""
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
        """Adds the gradient of a micro-batch's loss to the optimiser's; returns the loss, as ``SummedLoss``.

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
        losses = [self.gradient(batch.inputs, step, number) for number, batch in enumerate(batches)]
        rate = self.rate(step)
        norm, finite, *terms = self.optimizer(Tensor(rate, ms.float32), Tensor(label_tokens, ms.float32))
        for hook in self.hooks:
            hook.after_step(step)
        self.pending.append(
            _Pending(
                step=step,
                losses=losses,
                norm=norm,
                finite=finite,
                terms=terms,
                tokens=tokens,
                label_tokens=label_tokens,
                learning_rate=rate,
            )
        )

    def read(self) -> list[StepRecord]:
        """Waits for the pending steps, and returns their numbers.

        Raises:
            LoraMsError: a loss or gradient that is not finite (in float16, more than MAX_SKIPPED times in a row); no
                parameter was changed by it.
        """
        pending, self.pending = self.pending, []
        further = len(self.row_terms) if self.comparison is None else self.comparison.SUMS
        sums = np.zeros((len(pending), 1 + further))
        for row, p in zip(sums, pending, strict=True):
            for loss in p.losses:
                row += loss.asnumpy()
        if self.sum_over_data is not None:
            sums = self.sum_over_data(Tensor(sums.astype(np.float32))).asnumpy()
        norms = [float(p.norm.asnumpy()) for p in pending]
        now = time.perf_counter()
        seconds = (now - self.clock) / len(pending)  # of each step
        waited = self.waited / len(pending)
        self.clock, self.waited = now, 0.0
        return [
            self._record(p, total, norm, seconds, waited)
            for p, total, norm in zip(pending, sums.tolist(), norms, strict=True)
        ]

    def _record(self, p: _Pending, total: list[float], norm: float, seconds: float, waited: float) -> StepRecord:
        """total: the sum of what ``SummedLoss`` gives: the loss times all label tokens, and the further numbers."""
        first = total[0] / p.label_tokens  # the mean cross-entropy, or what stands in its place
        of_rows = [value / p.label_tokens for value in total[1:]] if self.comparison is None else []
        values = [*(float(value.asnumpy()) for value in p.terms), *of_rows]
        terms = dict(zip(self.terms, values, strict=True))
        loss = first + sum(terms.values())
        self._check_finite(p, loss)
        name = CROSS_ENTROPY if self.comparison is None else self.comparison.name
        shown = {name: first, **terms} if terms else {}
        metrics = {} if self.comparison is None else self.plan.terms[0].metrics(np.array(total[1:]))
        return StepRecord(
            step=p.step + 1,
            epoch=round(self.plan.epoch_of(p.step + 1), 4),
            loss=_finite(loss),
            grad_norm=_finite(norm),
            learning_rate=p.learning_rate,
            tokens=p.tokens,
            label_tokens=p.label_tokens,
            tokens_per_second=round(p.tokens / seconds, 1),
            step_time_s=round(seconds, 4),
            wait_share=round(waited / seconds, 4),
            peak_memory_mb=round(peak_memory_mb(self.runtime.device), 1),
            terms={name: _finite(value) for name, value in shown.items()},
            metrics={name: value for name, value in metrics.items() if np.isfinite(value)},
        )

    def _check_finite(self, p: _Pending, loss: float) -> None:
        if bool(p.finite.asnumpy()) and np.isfinite(loss):
            self.skipped = 0
            return
        self.skipped += 1
        scaled = self.loss_scaling is not None  # a loss scale that is too high overflows, and is lowered then
        if scaled and self.skipped <= MAX_SKIPPED:
            return
        rows = [self.plan.where(int(i)) for i in self.plan.step_rows(p.step)]
        named = f"step {p.step + 1} (rows {', '.join(rows[:4])}{' …' if len(rows) > 4 else ''})"
        what = "gradient" if np.isfinite(loss) else "loss"
        value = "not finite" if np.isfinite(loss) else f"{loss}"
        often = f", as in the {MAX_SKIPPED} steps before" if scaled else ""
        raise LoraMsError(
            f"the {what} of {named} is {value}{often}; no weight was changed by it: lower the learning rate, or look "
            "at these rows"
        )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
