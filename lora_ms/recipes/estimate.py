"""What a configuration needs in memory, before any weight is read: for ``lora-ms estimate``, and one line of a run."""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ms.adapters.matching import check_listed, ranges
from lora_ms.adapters.methods.base import AdapterConfig, Cost
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.config import RunConfig
from lora_ms.config.optimizer import Optimizer
from lora_ms.data.packing import Shape
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import quantised_layers
from lora_ms.ops.dynamic_map import BLOCK
from lora_ms.recipes import data, session
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.model import quantisation_of_run
from lora_ms.runtime import host, memory_estimate
from lora_ms.runtime.choice import Device, default_dtype
from lora_ms.runtime.device import Runtime, has_native
from lora_ms.runtime.memory_estimate import Job
from lora_ms.train.gradient import recomputed_layers
from lora_ms.train.settings import TrainSettings
from lora_ms.weights import size_ahead

# Device, MB that a run can use of its memory, and whether host and card share it. Of an Orange Pi's the system takes
# 1.5 GB.
DEVICES: dict[str, tuple[Device, float, bool]] = {
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


def job_of(config: RunConfig, sizes: DecoderConfig, device: Device) -> Job:
    """What decides the memory of one process of the run that ``config`` describes.

    Raises:
        LoraMsError: target_modules that match nothing, layers that do not exist, no adapter in load_adapter.
    """
    processes = session.sharing(config)
    sizes = replace(sizes, **{name: getattr(sizes, name) // processes for name in session.DIVIDED.values()})
    pet = config.pet_config
    adapter = None if pet is None else adapter_config(pet)
    if adapter is not None and config.backend == "native":  # MindFormers' modules have other paths
        check_modules(adapter, sizes)
    if pet is not None and config.load_adapter:
        adapter = read_adapter_config(config.load_adapter).continued(pet, pet.model_fields_set)
    virtual = 0 if adapter is None else adapter.virtual_tokens
    answers = 1 if config.preferences == "none" else 2  # to a line
    dtype = config.model.sizes.compute_dtype or default_dtype(device)
    four_bits = quantisation_of_run(config, sizes.num_hidden_layers)
    quantised = [] if four_bits is None else [name for name in linear_layers(sizes) if four_bits.quantises(name)]
    width: dict[str, Any] = {} if four_bits is None else {"quantised_width": four_bits.width}
    beside_checkpoint = Path(config.load_checkpoint) / "tokenizer_config.json"
    return Job(
        sizes=sizes,
        lines=config.batch_size,
        length=(data.seq_length(config, sizes.max_position_embeddings) + virtual) * answers,
        **adapter_parts(adapter, sizes, alone=processes == 1 and config.backend == "native"),
        dtype=dtype,
        recomputed=frozenset(recomputed_layers(config.recompute_config.recompute, sizes.num_hidden_layers)),
        tokenizer=beside_checkpoint.is_file() or bool(config.processor.tokenizer.vocab_file),
        device=device,
        moments=moment_bytes(config.optimizer),
        swap=config.optimizer.swap,
        native=config.context.cpu_operators and has_native(device),
        quantised=frozenset(quantised),
        **width,
        quantisable=config.backend == "native"
        and Path(config.load_checkpoint).is_dir()
        and bool(config.load_checkpoint),
    )


def check_modules(adapter: AdapterConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where the lists of a fresh adapter name what a model of these sizes has not."""
    adapter.check_listed(list(memory_estimate.modules(sizes)))
    check_listed("modules_to_save", adapter.modules_to_save, list(whole_modules(sizes)), str.endswith)


def fitting(
    settings: TrainSettings, model: CausalLM, adapter: AdapterConfig | None, runtime: Runtime, longest: int
) -> TrainSettings:
    """``settings`` with its rows of a step in as many micro-batches as the free memory asks for; prints a line then.

    longest: tokens of the longest row.
    """
    if not runtime.uses_host_memory:
        return settings
    recomputed = recomputed_layers(settings.recompute, model.config.num_hidden_layers)
    job = Job(
        sizes=model.config,
        lines=settings.batch_size,
        length=longest,
        **adapter_parts(adapter, model.config),
        dtype=str(model.dtype).lower(),
        recomputed=frozenset(recomputed),
        device=runtime.device,
        native=has_native(runtime.device),
        quantised=frozenset(quantised_layers(model)),
        moments=moment_bytes(settings),
    )
    room = host.available() / runtime.world
    # the weights are in memory already
    most = max(1, memory_estimate.largest_batch(job, room + memory_estimate.weights_mb(job)))
    lines = settings.batch_size
    while lines > most and lines % 2 == 0:
        lines //= 2
    if lines == settings.batch_size:
        return settings
    parts = settings.batch_size // lines
    print(f"{size(room)} of memory free: the {settings.batch_size} rows of a step are computed {lines} at a time")
    return replace(settings, batch_size=lines, accumulation=settings.accumulation * parts)


def adapter_parts(adapter: AdapterConfig | None, sizes: DecoderConfig, alone: bool = True) -> dict[str, Any]:
    """The fields of a ``Job`` that the adapter decides; None: all parameters train.

    alone: whether this process has whole layers, and they are ours.
    """
    if adapter is None:
        return {"costs": None}
    modules = memory_estimate.modules(sizes)
    adapter = adapter.fitted({name: (outputs, inputs) for name, (inputs, outputs) in modules.items()})
    costs = {name: adapter.cost(spec, *modules[name]) for name, spec in adapter.specs(modules).items()}
    saved = {name: n for name, n in saved_numbers(adapter, sizes).items() if name not in costs}
    rows = adapter.trained_rows(modules, sizes.tie_word_embeddings)
    return {
        "costs": costs | {f"{name}.trained_tokens": Cost(n * sizes.hidden_size, kept=0) for name, n in rows.items()},
        "saved": saved | trained_biases(adapter, sizes, costs, saved),
        "dropout": adapter.dropout,
        "separate_dropout": adapter.separate_dropout,
        "adds_factors_alone": alone and adapter.adds_factors_alone,
    }


def saved_numbers(adapter: AdapterConfig, sizes: DecoderConfig) -> dict[str, int]:
    """The numbers of each module that ``modules_to_save`` names, by path; a tied head comes apart and counts alone."""
    return {name: n for name, n in whole_modules(sizes).items() if name.endswith(adapter.modules_to_save)}


def whole_modules(sizes: DecoderConfig) -> dict[str, int]:
    """The numbers of each module that can train whole, by path."""
    numbers = {"model.norm": sizes.hidden_size}
    biases = bias_numbers(sizes)
    for name, (inputs, outputs) in memory_estimate.modules(sizes).items():
        numbers[name] = inputs * outputs + biases.get(name, 0)
    for i in range(sizes.num_hidden_layers):
        layer = f"model.layers.{i}"
        numbers |= {f"{layer}.{name}_layernorm": sizes.hidden_size for name in ("input", "post_attention")}
        if sizes.qk_norm:
            numbers |= {f"{layer}.self_attn.{name}_norm": sizes.head_dim for name in "qk"}
    return numbers


def trained_biases(
    adapter: AdapterConfig, sizes: DecoderConfig, adapted: Container[str], saved: Container[str]
) -> dict[str, int]:
    """The numbers of each bias of the model that trains beside the adapter, by path."""
    return {
        f"{name}.bias": n
        for name, n in bias_numbers(sizes).items()
        if name not in saved and (adapter.trains_all_biases or (adapter.trains_biases and name in adapted))
    }


def bias_numbers(sizes: DecoderConfig) -> dict[str, int]:
    """The numbers of the bias of each module that has one, by the module's path."""
    biased = ("q_proj", "k_proj", "v_proj") if sizes.attention_bias else ()
    return {name: outputs for name, (_, outputs) in memory_estimate.modules(sizes).items() if name.endswith(biased)}


def moment_bytes(optimizer: Optimizer | TrainSettings) -> float:
    """Of memory, for a number that trains."""
    if optimizer.paged:
        return 0.0
    return 2 + 2 * 4 / BLOCK if optimizer.eight_bits else 8.0


def linear_layers(sizes: DecoderConfig) -> list[str]:
    """The modules that quantisation may reach."""
    return [name for name in memory_estimate.modules(sizes) if name.startswith("model.layers.")]


def needs(job: Job, shared: bool = True) -> float:
    """MB of the device's memory; where host and device do not share it, libraries and graphs lie in the host's."""
    found = memory_estimate.estimate(job)
    return found.total if shared else found.total - found.libraries - found.graphs


def announce(config: RunConfig, sizes: DecoderConfig, runtime: Runtime, shape: Shape) -> None:
    """Prints the estimate of a run whose largest micro-batch is ``shape``, and a warning where it will not fit.

    On the CPU only, where all processes are taken to be on this machine.
    """
    if not runtime.uses_host_memory:
        return
    job = replace(job_of(config, sizes, runtime.device), lines=shape.lines, length=shape.length)
    total = memory_estimate.estimate(job).total
    room = host.available() / runtime.world + size_ahead() / host.MB
    each = " for each process" if runtime.world > 1 else ""
    print(f"memory: about {size(total)} at the peak, {size(room)} free{each}")
    if total > room:
        change = ", ".join(memory_estimate.remedies(job, room)) or "a smaller model, or a larger machine"
        print(f"warning: this run will probably run out of memory; change: {change}", flush=True)


def size(megabytes: float) -> str:
    """``812 MB`` or ``13.5 GB``."""
    return f"{megabytes:,.0f} MB" if megabytes < 1024 else f"{megabytes / 1024:.1f} GB"


def table(job: Job, room: float) -> list[str]:
    """The parts of a run's memory on this machine, which has ``room`` MB."""
    found = memory_estimate.estimate(job)
    parameters = memory_estimate.parameters(job.sizes)
    recomputed = ""
    if job.recomputed:
        recomputed = f", {len(job.recomputed)} of {job.sizes.num_hidden_layers} layers recomputed"
    lines = [
        f"{parameters:,} parameters in {job.dtype}{four_bits(job)}; {memory_estimate.trainable(job):,} numbers train",
        f"{job.lines} x {job.length:,} tokens at a time{recomputed}; {job.device}, {size(room)} free",
        "",
    ]
    lines += [f"  {text:32}{size(getattr(found, name)):>10}" for name, text in PURPOSES.items()]
    return [*lines, f"  {'all, at the peak':32}{size(found.total):>10}"]


def four_bits(job: Job) -> str:
    """What of the weights is in four bits, for the user; "" where nothing is."""
    if not job.quantised:
        return ""
    dense = memory_estimate.modules(job.sizes)
    numbers = sum(dense[name][0] * dense[name][1] for name in job.quantised)
    layers = ranges({int(name.split(".")[2]) for name in job.quantised})
    return f", {numbers:,} of them (layers {layers}) in {8 * job.quantised_width:.2f} bits"


def fits(config: RunConfig, sizes: DecoderConfig, this_machine: dict[str, tuple[Device, float, bool]]) -> list[str]:
    """A table of devices with what fits on each: this machine, and those of DEVICES, which were not measured.

    this_machine: in the form of DEVICES; empty where there is no estimate for it.
    """
    devices = this_machine | DEVICES
    lines = [f"  {'device':20}{'this run':>10}  {'':14}{'largest batch':>14}{'longest row':>13}"]
    for name, (device, limit, shared) in devices.items():
        job = job_of(config, sizes, device)
        need = needs(job, shared)
        in_host_memory = needs(job) - need
        verdict = "fits" if need <= limit else "does not fit"
        batch = memory_estimate.largest_batch(job, limit + in_host_memory)
        length = memory_estimate.largest_length(job, limit + in_host_memory)
        length = min(length, sizes.max_position_embeddings)
        lines.append(f"  {name:20}{size(need):>10}  {verdict:14}{batch or 'none':>14}{length or 'none':>13}")
    note = f"largest batch: of {job.length:,} tokens each; longest row: alone, in tokens"
    return [*lines, f"  {note}", "  Ascend: the same arithmetic, in float16 unless told; not measured on hardware"]
