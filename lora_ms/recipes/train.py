"""From rows to a trained model on disk: what the command line and the Python API share."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import mindspore as ms
from mindspore import nn

from lora_ms import storage
from lora_ms.adapters.methods.training import rate_factors
from lora_ms.data.example import Row
from lora_ms.data.loader import DataPlan, Source
from lora_ms.data.pipeline import Preparation, prepare_rows
from lora_ms.data.report import Report
from lora_ms.data.store import TokenStore
from lora_ms.data.tokenizer import pad_id
from lora_ms.runtime.device import Runtime, barrier, memory_share
from lora_ms.train import checkpoint
from lora_ms.train.adaptive import MemoryMonitor
from lora_ms.train.callbacks import EarlyStopping, TrainerCallback
from lora_ms.train.checkpoint import Weights
from lora_ms.train.evaluation import Evaluator
from lora_ms.train.hooks import StepHook
from lora_ms.train.loop import Outcome, TrainingLoop
from lora_ms.train.profile import Profiling
from lora_ms.train.report import Reporter
from lora_ms.train.settings import TrainSettings
from lora_ms.train.steps import Steps
from lora_ms.train.tensorboard import Summaries, TensorBoard

DATA_REPORT = "data_report.json"


def held_out_plan(
    store: TokenStore,
    batch_size: int,
    tokenizer,
    seq_length: int,
    runtime: Runtime,
    packing: bool = True,
    length_buckets: int = 4,
) -> DataPlan:
    """One pass over rows to evaluate, without shuffling."""
    return DataPlan.build(
        store,
        batch_size=batch_size,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        rank=runtime.data_rank,
        world=runtime.data_ranks,
        pad_id=pad_id(tokenizer),
        seq_length=seq_length,
        kind="packed" if packing else "bucketed",
        buckets=length_buckets,
    )


def plan_rows(rows: Iterable[Row], tokenizer, settings: TrainSettings, runtime: Runtime, vocab_size: int) -> DataPlan:
    """Tokenises and checks the rows, prints what became of them, and fixes the run's steps and shapes."""
    preparation = Preparation(seq_length=settings.seq_length, vocab_size=vocab_size)
    store, report = prepare_rows(rows, tokenizer, preparation)
    return plan_store(store, [report], (), tokenizer, settings, runtime)


def plan_store(
    store: TokenStore,
    reports: Sequence[Report],
    sources: Sequence[Source],
    tokenizer,
    settings: TrainSettings,
    runtime: Runtime,
) -> DataPlan:
    """Fixes the run's steps and shapes, and prints what became of the data.

    reports: one of each dataset. sources: their sizes and shares, where they are mixed.
    """
    s = settings
    plan = DataPlan.build(
        store,
        batch_size=s.batch_size,
        accumulation=s.accumulation,
        epochs=s.epochs,
        seed=s.seed,
        shuffle=s.shuffle,
        drop_remainder=s.drop_remainder,
        rank=runtime.data_rank,
        world=runtime.data_ranks,
        pad_id=pad_id(tokenizer),
        seq_length=s.seq_length,
        max_steps=s.max_steps,
        kind=s.layout,
        buckets=s.length_buckets,
        sources=sources,
        prefer_many_lines=s.adaptive_batch,
    )
    waste = plan.padding()
    finished = [dataclasses.replace(report, layout=plan.describe(), padding=waste) for report in reports]
    if runtime.is_main:
        print(*(line for report in finished for line in report.lines()), sep="\n")
        usual = f" (each micro-batch filled up to its longest row: {waste['usual']:.1%})"
        more = usual if plan.layout.kind == "packed" else ""
        print(f"  padding {waste[plan.layout.kind]:.1%} of the computed tokens{more}")
    plan.reports.extend(report.as_json() for report in finished)
    return plan


def watchers(settings: TrainSettings) -> list[TrainerCallback]:
    """The callbacks that the settings ask for."""
    s, out = settings, settings.output_dir
    found: list[TrainerCallback] = [Reporter(s.logging_steps)]
    if "tensorboard" in s.report_to:
        found.append(TensorBoard(out / "tensorboard", s.logging_steps))
    if s.summary_steps:
        found.append(Summaries(Path(s.summary_dir) if s.summary_dir else out / "summary", s.summary_steps))
    if s.profile_steps is not None:
        found.append(Profiling(Path(s.profile_dir) if s.profile_dir else out / "profile", *s.profile_steps))
    if s.patience:
        found.append(EarlyStopping(s.patience))
    return found


def fit(
    model: nn.Cell,
    plan: DataPlan,
    settings: TrainSettings,
    runtime: Runtime,
    weights: Weights,
    vocab_size: int,
    dtype: ms.Type,
    hooks: Sequence[StepHook] = (),
    evaluator: Evaluator | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Trains the trainable parameters of ``model`` and writes them; prints what it does.

    Raises:
        LoraMsError: nothing to train, a loss that is not finite, or a checkpoint that does not fit.
    """
    output_dir, looking_on = settings.output_dir, [*watchers(settings), *callbacks]
    monitor = None
    if settings.adaptive_batch:
        monitor = MemoryMonitor(plan.levels, partial(memory_share, runtime.device, settings.memory_budget_mb))
    ratio, factors = settings.loraplus_lr_ratio, {}
    if ratio != 1:
        factors = rate_factors(model, ratio, settings.loraplus_lr_embedding / (settings.learning_rate or 1.0))
    steps = Steps(
        model,
        plan,
        settings,
        runtime,
        vocab_size,
        loss_scaling=settings.loss_scaling if dtype == ms.float16 else None,
        hooks=hooks,
        rate_factors=factors,
    )
    run = TrainingLoop(steps, weights, evaluator, looking_on, monitor)
    if runtime.is_main:
        checkpoint.recover(output_dir)
    if runtime.world > 1:
        barrier()
    if settings.resume:
        run.restore(checkpoint.find(output_dir, settings.resume))
    elif runtime.is_main:
        old = checkpoint.clear(output_dir)
        if old:
            print(f"removed the checkpoints of an earlier run: {', '.join(old)}")
    start = run.state.step
    if runtime.is_main:
        storage.write_json(output_dir / DATA_REPORT, plan.reports)
        print(
            f"training: {plan.total_steps:,} steps of {plan.per_step} rows, "
            f"{plan.steps_per_epoch:,} an epoch" + (f", from step {start:,}" if start else "")
        )
        print("compiling the training step, which takes a while the first time …", flush=True)
    outcome = run.train()
    if not outcome.stopped:
        weights.collect()
    if runtime.is_main and not outcome.stopped:
        checkpoint.put(output_dir / weights.folder, weights.finish or weights.write)
    if runtime.world > 1:
        barrier()
    return outcome
