"""From rows to a trained model on disk: what the command line and the Python API share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
from mindspore import nn

from lora_ms.data.example import Example, TokenRow
from lora_ms.data.loader import DataPlan, prepare_rows
from lora_ms.data.tokenizer import pad_id
from lora_ms.runtime import Runtime, barrier
from lora_ms.train import checkpoint
from lora_ms.train.loop import Companion, Outcome, Run
from lora_ms.train.settings import TrainSettings


@dataclass(frozen=True)
class Weights:
    """How the trained weights go to and come from a directory."""

    folder: str  # under output_dir: "adapter", or "model" where all parameters train
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    identity: Mapping[str, object]  # what decides how the weights are used, such as lora_alpha
    finish: Callable[[Path], None] | None = (
        None  # writes them at the end of the run, where that is not as in a checkpoint
    )


def plan_rows(
    rows: Sequence[Example | TokenRow], tokenizer, settings: TrainSettings, runtime: Runtime, vocab_size: int
) -> DataPlan:
    """Tokenises and checks the rows, prints what became of them, and fixes the run's steps and shapes."""
    s = settings
    kept, report = prepare_rows(rows, tokenizer=tokenizer, seq_length=s.seq_length, vocab_size=vocab_size)
    plan = DataPlan.build(
        kept,
        batch_size=s.batch_size,
        accumulation=s.accumulation,
        epochs=s.epochs,
        seed=s.seed,
        shuffle=s.shuffle,
        drop_remainder=s.drop_remainder,
        rank=runtime.rank,
        world=runtime.world,
        pad_id=pad_id(tokenizer),
        seq_length=s.seq_length,
        max_steps=s.max_steps,
    )
    if runtime.is_main:
        print(*dataclasses.replace(report, padded_length=plan.padded_length).lines(), sep="\n")
    return plan


def fit(
    model: nn.Cell,
    plan: DataPlan,
    settings: TrainSettings,
    runtime: Runtime,
    weights: Weights,
    vocab_size: int,
    dtype: ms.Type,
    companion: Companion | None = None,
) -> Outcome:
    """Trains the trainable parameters of ``model`` and writes them; prints what it does.

    Raises:
        LoraMsError: nothing to train, a loss that is not finite, or a checkpoint that does not fit.
    """
    half = dtype == ms.float16
    run = Run(model, plan, settings, runtime, vocab_size, half, weights.write, weights.identity, companion)
    start = 0
    if not settings.resume and runtime.is_main:
        old = checkpoint.clear(settings.output_dir)
        if old:
            print(f"removed the checkpoints of an earlier run: {', '.join(old)}")
    if settings.resume:
        path = checkpoint.find(settings.output_dir, settings.resume)
        start = checkpoint.load_optimizer(path, run.optimizer, run.fingerprint())
        weights.read(path)
    if runtime.is_main:
        print(
            f"training: {plan.total_steps:,} steps of {plan.batch_size * plan.accumulation * plan.world} rows, "
            f"{plan.steps_per_epoch:,} an epoch" + (f", from step {start:,}" if start else "")
        )
        print("compiling the training step, which takes a while the first time …", flush=True)
    outcome = run.train(start)
    if runtime.is_main and not outcome.stopped:
        (weights.finish or weights.write)(settings.output_dir / weights.folder)
    if runtime.world > 1:
        barrier()
    return outcome
