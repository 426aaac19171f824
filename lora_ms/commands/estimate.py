"""``lora-ms estimate``: what a run will take, whether it fits, and what to change where it does not."""

from dataclasses import replace
from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.data.packing import Shape
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes import data, parallel
from lora_ms.recipes import session as common
from lora_ms.recipes.adapter import adapter_config
from lora_ms.runtime import host as machine
from lora_ms.runtime import memory_estimate as memory
from lora_ms.runtime import native_build as cpu
from lora_ms.runtime.device import Runtime, ascend_is_present
from lora_ms.runtime.memory_estimate import Job
from lora_ms.train.gradient import recomputed_layers

# MB that a run can have of each. On the Orange Pi host and card share the memory, and the system takes 1.5 GB of it.
DEVICES = {
    "Ascend 910B, 64 GB": ("Ascend", 59.0 * 1024, False),
    "Orange Pi 8 GB": ("Ascend", 6.5 * 1024, True),
    "Orange Pi 16 GB": ("Ascend", 14.5 * 1024, True),
    "Orange Pi 24 GB": ("Ascend", 22.5 * 1024, True),
}
PURPOSES = {
    "libraries": "Python, MindSpore, libraries",
    "weights": "weights",
    "training": "what trains, gradient, AdamW",
    "graphs": "compiled graphs",
    "activations": "activations",
    "logits": "logits",
}


def job_of(config: RunConfig, sizes: DecoderConfig, device: str) -> Job:
    """What decides the memory of a process of the run that ``config`` asks for.

    Raises:
        LoraMsError: target_modules that match nothing, layers that are not there.
    """
    processes = parallel.sharing(config)
    part = {name: getattr(sizes, name) // processes for name in parallel.DIVIDED.values()}
    sizes, ranks = replace(sizes, **part), None
    if config.pet_config is not None:
        found = adapter_config(config.pet_config).specs(memory.modules(sizes))
        ranks = {name: spec.lora_rank for name, spec in found.items()}
    count = sizes.num_hidden_layers
    asked = config.model.sizes.compute_dtype or ("float32" if device == "CPU" else "float16")
    return Job(
        sizes,
        config.batch_size,
        data.seq_length(config, sizes.max_position_embeddings),
        ranks,
        config.pet_config.lora_dropout if config.pet_config is not None else 0.0,
        asked != "float32",
        frozenset(recomputed_layers(config.recompute_config.recompute, count)),
        (Path(config.load_checkpoint) / "tokenizer_config.json").is_file()
        or bool(config.processor.tokenizer.vocab_file),
        "CPU" if device == "CPU" else "Ascend",
        config.optimizer.swap,
        device == "CPU" and config.context.cpu_operators and cpu.compiler() is not None,
        config.pet_config is not None and config.pet_config.lora_bias,
    )


def needs(job: Job, shared: bool = True) -> float:
    """MB of the device's memory; where it is not ``shared``, libraries and graphs lie in the host's."""
    found = memory.estimate(job)
    return found.total if shared else found.total - found.libraries - found.graphs


def announce(config: RunConfig, sizes: DecoderConfig, runtime: Runtime, shape: Shape) -> None:
    """Prints one line before a run, whose largest micro-batch is ``shape``: the estimate, and a warning where it will
    not fit. On the CPU alone, where all processes are taken to be on this machine."""
    if runtime.device != "CPU":
        return
    job = replace(job_of(config, sizes, "CPU"), lines=shape.lines, length=shape.length)
    total, room = memory.estimate(job).total, machine.available() / runtime.world
    each = " for each process" if runtime.world > 1 else ""
    print(f"memory: about {size(total)} at the peak, {size(room)} are free{each}")
    if total > room:
        change = ", ".join(memory.remedies(job, room)) or "a smaller model, or a larger machine"
        print(f"warning: this run will hardly fit into memory; change: {change}", flush=True)


def size(megabytes: float) -> str:
    """``812 MB`` or ``13.5 GB``."""
    return f"{megabytes:,.0f} MB" if megabytes < 1024 else f"{megabytes / 1024:.1f} GB"


def run(config: RunConfig) -> None:
    """Prints the table.

    Raises:
        LoraMsError: the model's sizes are not known, or it cannot be shared by so many processes.
    """
    sizes = common.read_sizes(config)
    parallel.check(config, sizes)
    processes = parallel.sharing(config)
    here = "Ascend" if config.context.device_target != "CPU" and ascend_is_present() else "CPU"
    job = job_of(config, sizes, here)
    room = machine.available() / processes
    if processes > 1:
        print(f"each of {processes} processes that share the model:")
    print("\n".join([*table(job, here, room), "", *fits(config, sizes, here, room)]))
    wanted = needs(job)
    if here == "CPU" and wanted > room:
        change = memory.remedies(job, room)
        print("", "it will not fit; change, until it does:", *(f"  {key}" for key in change or ["the model"]), sep="\n")


def table(job: Job, here: str, room: float) -> list[str]:
    """The run's parts."""
    found = memory.estimate(job)
    count, trains = memory.parameters(job.sizes), memory.trainable(job)
    dtype = "float16" if job.half else "float32"
    again = f", {len(job.again)} of {job.sizes.num_hidden_layers} layers computed again" if job.again else ""
    lines = [
        f"{count:,} parameters in {dtype}; {trains:,} numbers train",
        f"{job.lines} x {job.length:,} tokens at a time{again}; {here}, {size(room)} free",
        "",
    ]
    lines += [f"  {text:32}{size(getattr(found, name)):>10}" for name, text in PURPOSES.items()]
    return [*lines, f"  {'all, at the peak':32}{size(found.total):>10}"]


def fits(config: RunConfig, sizes: DecoderConfig, here: str, room: float) -> list[str]:
    """What fits where: this machine, and Ascend's, which were not measured."""
    rows = [("this machine", here, room, True)] if here == "CPU" else []
    rows += [(name, *row) for name, row in DEVICES.items()]
    lines = [f"  {'device':20}{'this run':>10}  {'':14}{'largest batch':>14}{'longest row':>13}"]
    for name, device, limit, shared in rows:
        job = job_of(config, sizes, device)
        outside = 0.0 if shared else needs(job) - needs(job, shared)
        need = needs(job, shared)
        verdict = "fits" if need <= limit else "does not fit"
        batch = memory.largest_batch(job, limit + outside)
        length = min(memory.largest_length(job, limit + outside), sizes.max_position_embeddings)
        lines.append(f"  {name:20}{size(need):>10}  {verdict:14}{batch or 'none':>14}{length or 'none':>13}")
    note = f"largest batch: of {job.length:,} tokens each; longest row: alone, in tokens"
    return [*lines, f"  {note}", "  Ascend: the same arithmetic, in float16 unless told; not measured on hardware"]
