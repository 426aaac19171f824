"""Everything about a run that can be checked before it: ``lora-ms finetune --dry_run``.

No weight is read, and nothing is written. A check follows also where the one before has failed, so that all that is
wrong shows at once.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.config import RunConfig
from lora_ms.data.loader import DataPlan
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import check_names
from lora_ms.nn.parallel import Shard
from lora_ms.recipes import adapter, data, session
from lora_ms.recipes.convert import shapes_of
from lora_ms.recipes.estimate import DEVICES, job_of, needs, size
from lora_ms.recipes.model import read_sizes
from lora_ms.recipes.native import read_rows
from lora_ms.recipes.objectives import check_rows
from lora_ms.recipes.settings import settings_of
from lora_ms.recipes.stored_adapter import check_adapter
from lora_ms.runtime import host, memory_estimate
from lora_ms.runtime.choice import Device, chosen
from lora_ms.runtime.device import Runtime
from lora_ms.text import counted, folded, size_text
from lora_ms.train import checkpoint, trackers

CARD = "Ascend 910B, 64 GB"  # what Ascend means on a machine without one
STATE = 12  # bytes of a checkpoint for a number that trains: itself and AdamW's two moments, in float32


@dataclass
class Findings:
    """What the checks have found. wrong: lines of errors. doubtful: lines of warnings."""

    wrong: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    @contextmanager
    def check(self) -> Iterator[None]:
        """Inside, an error of the user's is noted, and the next check goes on."""
        try:
            yield
        except LoraMsError as error:
            if str(error) not in self.wrong:
                self.wrong.append(str(error))


def dry_run(config: RunConfig, processes: int) -> Findings:
    """Checks the run that ``config`` describes, as ``processes`` processes, and prints what it would be."""
    found = Findings()
    if processes < 1:
        raise LoraMsError(f"dry_run {processes}: give the number of processes, 1 or more")
    if config.backend != "native":
        raise LoraMsError("--dry_run checks the native backend only: leave out --dry_run, or backend mindformers")
    for line in config.notices():
        print(folded(line))
    config.use_parallel = processes > 1
    with found.check():
        trackers.check(config.report_to)
    with found.check():
        session.check_run_output(config)
    if config.resume_training:
        with found.check():
            checkpoint.find(Path(config.output_dir), config.resume_training)
    for term in config.objectives:
        with found.check():
            term.check()
    pet = config.pet_config
    if pet is not None and not config.load_checkpoint:
        found.wrong.append("load_checkpoint is missing: give the model to put the adapter on")
    with found.check():
        adapter.check_training(config, None if pet is None else adapter.adapter_config(pet))
    sizes = None
    with found.check():
        sizes = read_sizes(config)
    if sizes is not None:
        with found.check():
            _check_weights(config, sizes)
        with found.check():
            _check_processes(config, sizes, processes)
        with found.check():
            check_adapter(config, sizes)
    elif config.load_adapter:
        with found.check():
            read_adapter_config(config.load_adapter)
    plan = None
    if not found.wrong and sizes is not None:
        with found.check():
            plan = _plan(config, sizes, processes)
    elif sizes is not None:
        with found.check():
            read_rows(config, sizes)
    else:
        with found.check():
            data.sources_of(config.train_dataset, "train")
    if sizes is not None and plan is not None:
        with found.check():
            _check_memory(config, sizes, plan, processes, found)
        with found.check():
            _check_disk(config, sizes, plan)
    return found


def _check_weights(config: RunConfig, sizes: DecoderConfig) -> None:
    """Names and shapes of the weights, from the files' headers."""
    path = Path(config.load_checkpoint)
    if not config.load_checkpoint or not path.is_dir():
        return
    folder = open_model(path, model_config(path))
    shapes = shapes_of(replace(sizes, tie_word_embeddings=folder.tied))
    entries = {name: entry.shape for name, entry in folder.entries.items() if not name.endswith("rotary_emb.inv_freq")}
    check_names(shapes, entries, str(path))
    stored = sum(entry.end - entry.start for entry in folder.entries.values())
    print(f"model: {path}, {counted(len(entries), 'tensor')}, {size_text(stored)}")


def _check_processes(config: RunConfig, sizes: DecoderConfig, processes: int) -> None:
    shared = session.sharing(config)
    if processes % shared:
        raise LoraMsError(
            f"{session.MODEL_PARALLEL} {shared} does not divide {processes} processes: change one of them"
        )
    adapter.check_parallel(config, sizes)
    if processes > 1:
        print(f"processes: {processes // shared} data-parallel x {shared} model-parallel")


def _plan(config: RunConfig, sizes: DecoderConfig, processes: int) -> DataPlan:
    settings = settings_of(config, sizes.max_position_embeddings)
    inputs = read_rows(config, sizes)
    runtime = Runtime(chosen(config.context.device_target), world=processes, shard=Shard(count=session.sharing(config)))
    plan = data.plan_training(inputs.rows, inputs.tokenizer, settings, runtime, adapter.leading_ids(config, sizes))
    check_rows(config, inputs.rows, plan.usual_lines)
    print(f"training: {counted(plan.total_steps, 'step')}, {counted(plan.per_step, 'row')} each")
    return plan


def _device(config: RunConfig) -> tuple[str, Device, float | None, bool]:
    """The device that the YAML names: its name, kind, MB that a run can use (None: this machine's), and whether host
    and card share them."""
    target = config.context.device_target
    budget = config.context.max_device_memory_mb
    if target == "Ascend" or chosen(target) == "Ascend":
        device, limit, shared = DEVICES[CARD]
        return ("Ascend" if budget else CARD), device, budget or limit, shared
    return "this machine", "CPU", None, True


def _check_memory(config: RunConfig, sizes: DecoderConfig, plan: DataPlan, processes: int, found: Findings) -> None:
    name, device, limit, shared = _device(config)
    shape = plan.layout.shapes[-1]
    job = replace(job_of(config, sizes, device), lines=shape.lines, length=shape.length)
    room = host.available() / processes if limit is None else limit
    need = needs(job, shared)
    each = " for each process" if processes > 1 else ""
    print(f"memory: about {size(need)} at the peak, {size(room)} on {name}{each}")
    if need > room:
        change = ", ".join(memory_estimate.remedies(job, room)) or "a smaller model, or a larger machine"
        found.wrong.append(
            f"memory: about {size(need)} are needed, and {size(room)} are there ({name}){each}; change: {change}"
        )
    elif need > 0.9 * room:
        found.doubtful.append(f"memory: {need / room:.0%} of what is there ({name})")


def _check_disk(config: RunConfig, sizes: DecoderConfig, plan: DataPlan) -> None:
    count = memory_estimate.trainable(job_of(replace_shared(config), sizes, "CPU"))
    kept = 0 if not config.save_steps else min(config.keep_checkpoint_max, plan.total_steps // config.save_steps)
    need = STATE * count * (kept + 1) + 4 * count  # one more stands beside those it replaces; then what was trained
    place = Path(config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    print(f"disk: about {size_text(need)} for {counted(kept + 1, 'checkpoint')} and the result, {size_text(free)} free")
    if need > free:
        raise LoraMsError(
            f"disk: about {size_text(need)} are needed in {place}, {size_text(free)} are free: lower "
            "keep_checkpoint_max, or give another output_dir"
        )


def replace_shared(config: RunConfig) -> RunConfig:
    """``config`` with the whole model in one process: checkpoints are whole."""
    changed = config.model_copy(deep=True)
    changed.use_parallel = False
    return changed
