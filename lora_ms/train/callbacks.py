"""Callbacks of a training run, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mindspore import nn


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step."""

    step: int  # from 1
    epoch: float
    loss: float | None  # nats per label token, with all extra terms; None where it overflowed in float16
    grad_norm: float | None  # before clipping; None where it overflowed in float16 and the step was left out
    learning_rate: float
    tokens: int  # without padding, on this rank
    label_tokens: int  # on all ranks
    tokens_per_second: float
    step_time_s: float
    wait_share: float  # of the step's time, spent waiting for data
    peak_memory_mb: float
    terms: dict[str, float | None] = field(default_factory=dict)  # what loss is the sum of, where that is several
    metrics: dict[str, float] = field(default_factory=dict)  # what else a comparison of answers shows


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation, after optimiser step ``step``."""

    step: int
    epoch: float
    eval_loss: float  # mean cross-entropy, nats per label token; of preferences, the mean loss of the rows
    eval_perplexity: float | None  # None for preferences
    eval_accuracy: float | None  # share of the label tokens that have the highest logit; None for preferences
    eval_label_tokens: int
    eval_time_s: float
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt and answer of each
    best: bool = False  # lower than every loss before
    metrics: dict[str, float] = field(default_factory=dict)  # of preferences, by the names in metrics.jsonl


@dataclass
class RunState:
    """Where a run is; ``stop`` ends it after the current step."""

    model: nn.Cell
    output_dir: Path
    total_steps: int
    is_main: bool  # whether this is the first of the run's processes
    step: int = 0  # optimiser steps that are done
    reason: str = ""  # why the run is to end before its last step
    best_step: int = 0  # of the lowest evaluation loss; 0: none yet
    best_loss: float | None = None
    worse: int = 0  # evaluations since the best

    def stop(self, reason: str) -> None:
        """Ends the run as if this were its last step."""
        self.reason = self.reason or reason


class TrainerCallback:
    """Methods that a run calls; override those you need. Each process has its own object."""

    def on_train_begin(self, state: RunState) -> None:
        """Called before the first step; ``state.step`` is above 0 in a resumed run."""

    def on_step_end(self, state: RunState, record: StepRecord) -> None:
        """Called when the numbers of an optimiser step have been read from the device."""

    def on_evaluate(self, state: RunState, evaluation: EvaluationRecord) -> None:
        """Called after the held-out rows have been evaluated."""

    def on_evaluation_due(self, state: RunState) -> None:
        """Called when an evaluation is due, even without held-out rows; all steps up to ``state.step`` are done."""

    def on_save(self, state: RunState, path: Path) -> None:
        """Called when checkpoint ``path`` is complete."""

    def on_notice(self, state: RunState, text: str) -> None:
        """Called with one line that the user should know."""

    def on_train_end(self, state: RunState) -> None:
        """Called after the last step, or when an error or a signal ends the run."""


class EarlyStopping(TrainerCallback):
    """Stops a run after ``patience`` evaluations in a row that were not the best."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, state: RunState, evaluation: EvaluationRecord) -> None:
        if state.worse >= self.patience:
            best = f"{state.best_loss:.4f} at step {state.best_step}"
            state.stop(f"no better evaluation in the last {state.worse} (best: {best})")
