"""A run of our own loop, as a configuration asks for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms.adapters.inject import report
from lora_ms.config import RunConfig, dump_config
from lora_ms.data.pipeline import Preparation
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes import adapter, data, estimate, session
from lora_ms.recipes.evaluate import evaluator_for
from lora_ms.recipes.forgetting import ReadSet, read_sets, scorer_of
from lora_ms.recipes.model import build_model, compute_dtype, four_bits_lines, read_sizes
from lora_ms.recipes.objectives import add_terms, check_rows, general_rows, reference_log_probs
from lora_ms.recipes.outputs import RUN_LOG, earlier_outputs, weights_of
from lora_ms.recipes.settings import settings_of
from lora_ms.recipes.starts import seen_rows
from lora_ms.recipes.stored_adapter import check_adapter
from lora_ms.recipes.train import NativeRun
from lora_ms.train import checkpoint, trackers
from lora_ms.train.callbacks import TrainerCallback
from lora_ms.train.forgetting import ForgettingReport
from lora_ms.train.hooks import StepHook
from lora_ms.train.log import Tee

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEW_ROWS = 100
LITTLE = 0.01  # sum of the steps' highest learning rates; of ten rows with few_rows it is 0.045


@dataclass(frozen=True)
class NativeInputs:
    """What a run starts from, found and checked before the device is started."""

    config: RunConfig
    sizes: DecoderConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    preparation: Preparation
    rows: data.PreparedRows
    held_out: data.PreparedRows | None
    sets: dict[str, ReadSet]  # of evaluation.sets


def read_inputs(config: RunConfig) -> NativeInputs:
    """Checks ``config`` and reads the rows, so that most errors show within seconds. Writes nothing.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    trackers.check(config.report_to)
    data.sources_of(config.train_dataset, "train")
    pet = config.pet_config
    if pet is not None and not config.load_checkpoint:
        raise LoraMsError(
            "load_checkpoint is missing: give the model to put the adapter on (pet_config: null trains anew)"
        )
    for term in config.objectives:
        term.check()
    adapter.check_training(config, None if pet is None else adapter.adapter_config(pet))
    sizes = read_sizes(config)
    adapter.check_parallel(config, sizes)
    check_adapter(config, sizes)
    inputs = read_rows(config, sizes)
    session.check_run_output(config)
    return inputs


def read_rows(config: RunConfig, sizes: DecoderConfig) -> NativeInputs:
    """Reads all rows of a run.

    Raises:
        LoraMsError: files that are not there, or hold none.
    """
    sources = data.sources_of(config.train_dataset, "train")
    tokenizer = data.tokenizer_for(config, training=True)
    preparation = data.preparation_of(config, config.train_dataset, sizes.max_position_embeddings, sizes.vocab_size)
    rows = data.rows_of(config.train_dataset, sources, tokenizer, preparation)
    rows, held_out = data.split_off(config, rows, tokenizer, preparation)
    sets = read_sets(config, tokenizer, preparation)
    return NativeInputs(
        config=config,
        sizes=sizes,
        tokenizer=tokenizer,
        preparation=preparation,
        rows=rows,
        held_out=held_out,
        sets=sets,
    )


def prepare(inputs: NativeInputs, log: Tee) -> NativeRun:
    """Starts the device, and builds the model with its adapter; prints what will be trained.

    Raises:
        LoraMsError: anything that a user can fix; nothing was written then.
    """
    config = inputs.config
    sizes = inputs.sizes
    tokenizer = inputs.tokenizer
    output_dir = Path(config.output_dir)
    runtime = session.start(config)
    dtype = compute_dtype(config, runtime)
    settings = settings_of(config, sizes.max_position_embeddings)
    if settings.resume and runtime.is_main:
        if output_dir.is_dir():
            log.to(output_dir / RUN_LOG)
            checkpoint.recover(output_dir)
        checkpoint.find(output_dir, settings.resume)
    lead = adapter.leading_ids(config, sizes)
    plan = data.plan_training(inputs.rows, tokenizer, settings, runtime, lead)
    check_rows(config, inputs.rows, plan.usual_lines)
    if runtime.is_main:
        if settings.seq_length > sizes.longest:
            print(
                f"seq_length {settings.seq_length} is beyond the {sizes.longest} positions that the model was made for"
            )
        estimate.announce(config, sizes, runtime, plan.layout.shapes[-1])
        if len(plan) < FEW_ROWS and plan.total_steps * settings.learning_rate < LITTLE:
            print(
                f"few rows: {plan.total_steps} steps at a learning rate of {settings.learning_rate:g} will hardly "
                "change the model; --preset few_rows takes more steps, and larger ones"
            )
    model = build_model(config, sizes, dtype, runtime)
    references, held_references = (
        None if rows is None else reference_log_probs(config.objectives, model, rows, size, tokenizer, runtime)
        for rows, size in ((inputs.rows, config.batch_size), (inputs.held_out, config.eval_batch_size))
    )
    schedule_steps = settings.schedule_steps if settings.schedule_steps > 0 else plan.total_steps
    seen = seen_rows(model, inputs.rows, settings, tokenizer, runtime)
    trained = adapter.attach(config, model, schedule_steps, runtime.shard, tokenizer, seen)
    hook = None if trained is None else trained.step_hook(model)
    added = add_terms(
        config.objectives,
        model,
        plan,
        inputs.rows,
        references=references,
        general=general_rows(config, inputs.rows),
        tokenizer=tokenizer,
        runtime=runtime,
    )
    if runtime.is_main:
        print(*four_bits_lines(model), report(model, trained, runtime.shard).line(), sep="\n")
        if hook is not None:
            print(hook.describe())
        for line in added.lines:
            print(line)
        if not settings.resume:
            log.to(output_dir / RUN_LOG)  # the first write: data, model and adapter are checked
            dump_config(config, str(output_dir / "config.yaml"))
    evaluator = None
    if inputs.held_out is not None:
        evaluator = evaluator_for(
            config, model, inputs.held_out, tokenizer, settings.seq_length, runtime, references=held_references
        )
    callbacks: list[TrainerCallback] = []
    if inputs.sets:
        scorer = scorer_of(config, model, inputs.sets, tokenizer, settings.seq_length, runtime)
        callbacks.append(ForgettingReport(scorer))
        if runtime.is_main:
            print(*(line for one in inputs.sets.values() for line in one.lines), sep="\n")
    weights = weights_of(model, trained, tokenizer, hook, runtime.shard)
    earlier = earlier_outputs(output_dir)
    if runtime.is_main and earlier and not settings.resume:
        print(f"{output_dir} holds {', '.join(earlier)} of an earlier run; this one writes {weights.folder} as it ends")
    hooks: list[StepHook] = [*([] if hook is None else [hook]), *added.hooks]
    return NativeRun(
        model,
        added.plan,
        settings,
        runtime,
        weights,
        hooks=hooks,
        row_terms=added.row_terms,
        comparison=added.comparison,
        evaluator=evaluator,
        callbacks=callbacks,
    )
