"""``lora-ms finetune``: from a model and a file of rows to an adapter."""

import sys
from pathlib import Path

import numpy as np

from lora_ms.adapters import inject as injection
from lora_ms.commands import estimate, evaluate
from lora_ms.config import PetConfig, RunConfig, dump_config
from lora_ms.config.sections import LossScale
from lora_ms.data.loader import permutation
from lora_ms.data.pipeline import Preparation
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.recipes import data, parallel
from lora_ms.recipes import session as common
from lora_ms.recipes.adapter import adapter_config, attach
from lora_ms.recipes.outputs import AS_LORA, weights_of
from lora_ms.recipes.train import fit, plan_store
from lora_ms.train import checkpoint
from lora_ms.train.groups import Group
from lora_ms.train.log import Tee
from lora_ms.train.settings import TrainSettings
from lora_ms.train.tensorboard import check


def settings_of(config: RunConfig, longest: int) -> TrainSettings:
    """The settings of a run that a configuration holds; ``longest``: the model's own limit in tokens."""
    runner, schedule, scale = config.runner_config, config.lr_schedule, config.runner_wrapper.scale_sense
    if not isinstance(
        scale, LossScale
    ):  # a number is a fixed factor; 1, which float16 cannot train with, means dynamic
        kind = "DynamicLossScaleUpdateCell" if scale == 1 else "FixedLossScaleUpdateCell"
        scale = LossScale(type=kind, loss_scale_value=65536 if scale == 1 else scale)
    pet, summary, profiling = config.pet_config or PetConfig(), config.summary, config.profiling
    return TrainSettings(
        output_dir=Path(config.output_dir),
        epochs=runner.epochs,
        batch_size=config.batch_size,
        accumulation=runner.gradient_accumulation_steps,
        max_steps=runner.max_steps,
        seq_length=data.seq_length(config, longest),
        packing=config.train_dataset.packing,
        length_buckets=config.train_dataset.length_buckets,
        shuffle=config.train_dataset.data_loader.shuffle,
        drop_remainder=config.train_dataset.drop_remainder,
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_kind=schedule.kind,
        lr_end=schedule.lr_end,
        warmup_ratio=schedule.warmup_ratio or 0.0,
        warmup_steps=schedule.warmup_steps or 0,
        schedule_steps=schedule.total_steps,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        swap=config.optimizer.swap,
        groups=tuple(Group(g.params, g.learning_rate, g.weight_decay) for g in config.optimizer.groups),
        max_grad_norm=config.max_grad_norm,
        loraplus_lr_ratio=pet.loraplus_lr_ratio,
        loraplus_lr_embedding=pet.loraplus_lr_embedding,
        neftune_noise_alpha=pet.neftune_noise_alpha,
        loss_scale=scale.loss_scale_value,
        dynamic_scale=scale.type == "DynamicLossScaleUpdateCell",
        scale_window=scale.scale_window,
        scale_factor=scale.scale_factor,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        keep_checkpoint_max=config.keep_checkpoint_max,
        eval_steps=config.eval_intervals[0],
        eval_epochs=config.eval_intervals[1],
        keep_best=config.evaluation.keep_best,
        patience=config.evaluation.patience,
        sink_size=runner.sink_size if runner.sink_mode else 1,
        recompute=config.recompute_config.recompute,
        adaptive_batch=runner.adaptive_batch,
        memory_budget_mb=config.context.max_device_memory_mb,
        report_to=tuple(config.report_to),
        summary_steps=summary.collect_freq if summary else 0,
        summary_dir=summary.summary_dir if summary else "",
        profile_steps=(profiling.start_step, profiling.stop_step) if profiling else None,
        profile_dir=profiling.output_path if profiling else "",
        resume=config.resume_training,
    )


def split_off(
    config: RunConfig, store: TokenStore, tokenizer, how: Preparation
) -> tuple[TokenStore, TokenStore | None]:
    """Rows to train on, and rows to evaluate on: ``validation_split``'s, or, with do_eval, eval_dataset's.

    Raises:
        LoraMsError: nothing remains on one of the sides, or parts of a mixture would be torn.
    """
    share = config.train_dataset.validation_split
    if not share:
        if not config.evaluates:
            return store, None
        sources = data.sources_of(config.eval_dataset, "eval")
        how = data.preparation(config, config.eval_dataset, how.seq_length, how.vocab_size)
        return store, data.rows_of(config.eval_dataset, sources, tokenizer, how)[0]
    if config.train_dataset.mix:
        raise LoraMsError(
            "validation_split and mix are both given: hold rows out in an eval_dataset, with do_eval: True"
        )
    count = round(share * len(store))
    if not 0 < count < len(store):
        raise LoraMsError(f"validation_split {share} of {len(store)} rows leaves {count} to evaluate on: change it")
    order = permutation(len(store), config.seed, 1 << 20)
    return store.take(np.sort(order[count:])), store.take(np.sort(order[:count]))


def run(config: RunConfig) -> None:
    """Trains as ``config`` says; outputs under ``output_dir`` as the README lists them.

    Raises:
        LoraMsError: anything that a user can mend.
    """
    output_dir = Path(config.output_dir)
    check(config.report_to)
    sources = data.sources_of(config.train_dataset, "train")
    if config.pet_config is not None and not config.load_checkpoint:
        raise LoraMsError(
            "load_checkpoint is missing: give the model to put the adapter on (pet_config: null trains anew)"
        )
    # what is wrong with pet_config shows before anything is read
    parallel.check_training(config, None if config.pet_config is None else adapter_config(config.pet_config))
    sizes = common.read_sizes(config)
    parallel.check(config, sizes)
    tokenizer = data.tokenizer_for(config, training=True)
    how = data.preparation(config, config.train_dataset, sizes.max_position_embeddings, sizes.vocab_size)
    store, reports, shares = data.rows_of(config.train_dataset, sources, tokenizer, how)
    store, held_out = split_off(config, store, tokenizer, how)
    common.check_output(output_dir)
    with Tee() as log:
        runtime = common.start(config)
        dtype = common.compute_dtype(config, runtime)
        settings = settings_of(config, sizes.max_position_embeddings)
        if settings.resume:
            checkpoint.find(output_dir, settings.resume)
        plan = plan_store(store, reports, shares, tokenizer, settings, runtime)
        if runtime.is_main:
            if how.seq_length > sizes.max_position_embeddings:
                made_for = sizes.max_position_embeddings
                print(f"seq_length {how.seq_length} is beyond the {made_for} positions that the model was made for")
            estimate.announce(config, sizes, runtime, plan.layout.shapes[-1])
        model = common.build_model(config, sizes, dtype, runtime.operators, runtime.shard)
        schedule_steps = settings.schedule_steps if settings.schedule_steps > 0 else plan.total_steps
        adapter = attach(config, model, schedule_steps, runtime.shard)
        hook = None if adapter is None else adapter.step_hook(model)
        if runtime.is_main:
            print(injection.report(model, adapter, runtime.shard).line())
            if hook is not None:
                print(hook.describe())
            log.to(output_dir / "run.log")  # the first write: data, model and adapter are checked
            if not settings.resume:
                dump_config(config, str(output_dir / "config.yaml"))
        evaluator = None
        if held_out is not None:
            evaluator = evaluate.evaluator_for(config, model, held_out, tokenizer, how.seq_length, runtime)
        weights = weights_of(model, adapter, tokenizer, hook, runtime.shard)
        former = [name for name in (*checkpoint.FOLDERS, AS_LORA) if (output_dir / name).is_dir()]
        if runtime.is_main and former and not settings.resume:
            print(
                f"{output_dir} holds {', '.join(former)} of an earlier run; this one writes {weights.folder} as it ends"
            )
        hooks = [] if hook is None else [hook]
        outcome = fit(model, plan, settings, runtime, weights, sizes.vocab_size, dtype, hooks, evaluator)
        if runtime.is_main and outcome.stopped:
            print(f"stopped after step {outcome.steps:,} of {plan.total_steps:,}, and saved")
            print("to go on, give the same command with --resume_training True")
        elif runtime.is_main:
            done = (
                f"loss {outcome.first_loss:.4f} -> {outcome.last_loss:.4f} in" if outcome.losses else "nothing left of"
            )
            if outcome.reason:
                print(f"stopped early: {outcome.reason}")
            now = len(outcome.losses)
            print(f"{done} {outcome.steps:,} steps{f', {now:,} of them now' if settings.resume else ''}")
            if held_out is not None and settings.keep_best:
                print(f"weights of the best evaluation: {output_dir / checkpoint.BEST}")
            print(f"{weights.folder}: {output_dir / weights.folder}   loss plot: {output_dir / 'loss.png'}")
    if outcome.stopped:
        sys.exit(130)
