"""Fisher information of general rows, for the term ``ewc``: what ``lora-ms fisher`` does."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.config import RunConfig
from lora_ms.config.sections import Dataset
from lora_ms.data.loader import DataPlan
from lora_ms.data.tokenizer import pad_id
from lora_ms.errors import LoraMsError
from lora_ms.objectives import fisher_file
from lora_ms.objectives.parameter_terms import EwcKeys
from lora_ms.reading import parse_json
from lora_ms.recipes import adapter, data, session
from lora_ms.recipes.model import build_model, compute_dtype, read_sizes
from lora_ms.recipes.stored_adapter import check_adapter
from lora_ms.text import counted
from lora_ms.train.fisher import FisherRun, RowProgress
from lora_ms.train.signals import StopSignal

SAVE_EVERY = 60.0  # seconds
TOGETHER = 500  # the same for several processes, in steps
PART = ".part"  # end of the name of the file from which a run that was stopped goes on
TOTAL = "total"


def general_part(dataset: Dataset) -> Dataset:
    """``train_dataset`` with the parts of ``mix`` whose role is general; as it is where none has it."""
    general = [part for part in dataset.mix if part.role == "general"]
    return dataset.model_copy(update={"mix": general or dataset.mix})


def output_of(config: RunConfig, output: str | None) -> Path:
    """Where the file goes: ``output``, else where the configuration's ``ewc`` reads it, else into output_dir."""
    named = [term.fisher for term in config.objectives if isinstance(term, EwcKeys)]
    return Path(output or next(iter(named), f"{config.output_dir}/fisher.safetensors"))


def measure(config: RunConfig, output: str | None = None, params: str | None = None) -> Path:
    """Writes the mean squared gradient of every row's mean loss, of the parameters that ``config`` trains, at the
    values that its training starts from.

    Args:
        output: file to write; None for ``output_of``.
        params: regular expression that fits the whole dotted names of the parameters to measure; None for all.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    file = output_of(config, output)
    session.check_output(file.parent)
    session.check_alone(config, "fisher")
    if config.preferences != "none":
        raise LoraMsError("fisher measures answers that are learnt: leave objectives of preferences out of its YAML")
    pet = config.pet_config
    adapter.check_training(config, None if pet is None else adapter.adapter_config(pet))
    sizes = read_sizes(config)
    check_adapter(config, sizes)
    tokenizer = data.tokenizer_for(config, training=True)
    preparation = data.preparation_of(config, config.train_dataset, sizes.max_position_embeddings, sizes.vocab_size)
    dataset = general_part(config.train_dataset)
    rows = data.rows_of(dataset, data.sources_of(dataset, "train"), tokenizer, preparation)
    store = rows.store
    runtime = session.start(config)
    if runtime.is_main:
        print(*(line for report in rows.reports for line in report.lines()), sep="\n")
    model = build_model(config, sizes, compute_dtype(config, runtime), runtime)
    adapter.attach(config, model, 10**6)
    trained = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
    chosen = {name: p for name, p in trained.items() if params is None or re.fullmatch(params, name)}
    if not chosen:
        raise LoraMsError(f"params {params!r} fits none of the parameters that train, such as {next(iter(trained))}")
    for name, parameter in trained.items():
        parameter.requires_grad = name in chosen
    lead = model.leading_ids
    plan = DataPlan.build(
        store.led_by(lead),
        batch_size=1,
        accumulation=1,
        epochs=1,
        seed=0,
        shuffle=False,
        rank=runtime.data_rank,
        world=runtime.data_ranks,
        pad_id=pad_id(tokenizer),
        seq_length=preparation.seq_length + len(lead),
        kind="bucketed",
    )
    settings = {
        "rows": len(store),
        "rows_crc32": plan.checksum(),
        "start": fisher_file.digest_of_values({name: p.asnumpy() for name, p in chosen.items()}),
        "loss": "mean over the row's label tokens",
        "load_checkpoint": config.load_checkpoint,
        "load_adapter": config.load_adapter,
        "seq_length": preparation.seq_length,
        "params": params or "",
    }
    run = FisherRun(model, chosen, plan, runtime, sizes.vocab_size)
    numbers = sum(p.size for p in chosen.values())
    if runtime.is_main:
        print(f"fisher: {numbers:,} numbers of {counted(len(chosen), 'parameter')}, on {counted(len(store), 'row')}")
    part = file.with_name(file.name + PART)
    done = _resume(part, settings, run, numbers)
    run.check_same(done)
    if done and runtime.is_main:
        print(f"going on after {done:,} of {plan.steps_per_epoch:,} steps, from {part}")
    _take_rows(run, part, settings, done, runtime.is_main)
    means = run.means()
    if runtime.is_main:
        fisher_file.write(file, means, settings)
        part.unlink(missing_ok=True)
        values = np.concatenate([value.ravel() for value in means.values()])
        print(f"fisher: mean {values.mean():.3g}, largest {values.max():.3g}, {np.mean(values == 0):.1%} are 0: {file}")
    return file


def _resume(part: Path, settings: dict, run: FisherRun, numbers: int) -> int:
    """The steps that an earlier call has done, taken over into ``run``; 0 where there is none of these settings."""
    if not part.is_file():
        return 0
    entries = storage.read_header(part)
    try:
        stored = parse_json(storage.read_metadata(part)[fisher_file.KEY])
        done = stored.pop("done")
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError):
        raise LoraMsError(f"{part}: not what an unfinished lora-ms fisher leaves: remove it") from None
    fits = stored == settings and TOTAL in entries and entries[TOTAL].shape == (numbers,)
    if not fits or type(done) is not int or not 0 <= done <= run.plan.steps_per_epoch:
        return 0
    run.restore(storage.read(entries[TOTAL], np.float32))
    return done


def _take_rows(run: FisherRun, part: Path, settings: dict, done: int, is_main: bool) -> None:
    """Takes the rows that are left; keeps what is done every minute, by steps that all processes agree on."""
    total = run.plan.steps_per_epoch
    progress = RowProgress(done, total, is_main)
    begun = time.monotonic()
    alone = run.sum_over_data is None
    with StopSignal() as stop:
        for step in run.steps(done):
            progress.show(step)
            stopped = run.any_process(stop.seen)
            # several processes, whose clocks differ, keep by number
            due = stopped or (time.monotonic() - begun > SAVE_EVERY if alone else step % TOGETHER == 0)
            if due and step < total:
                keep(part, run, settings, step, is_main)
                begun = time.monotonic()
                if stopped:
                    progress.close()
                    if is_main:
                        print(f"stopped after {step:,} of {total:,}, and kept in {part}: the same command goes on")
                    if not alone:
                        session.wait_for_all()  # until the file is written: one that ends, ends the others
                    sys.exit(130)
    progress.close()


def keep(part: Path, run: FisherRun, settings: dict, step: int, is_main: bool) -> None:
    """Writes the sum so far; all processes call it."""
    total = run.total()
    if is_main:
        metadata = {fisher_file.KEY: json.dumps({**settings, "done": step})}
        storage.write_tensors(part, {TOTAL: total}, metadata)
