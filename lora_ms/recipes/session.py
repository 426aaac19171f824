"""The processes of a run, their device and their output folder: what is checked before, and how it starts."""

import gc
import os
from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.runtime import device
from lora_ms.runtime.device import Runtime
from lora_ms.text import folded
from lora_ms.train import checkpoint
from lora_ms.train.log import locked_output

MODEL_PARALLEL = "parallel_config.model_parallel"
# sizes that are divided among the processes that share a model: YAML key -> DecoderConfig's
DIVIDED = {
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def start(config: RunConfig) -> Runtime:
    """Starts MindSpore on the device that ``config`` names; prints what the user should know."""
    context = config.context
    runtime, notices = device.setup(
        context.device_target,
        context.device_id,
        seed=config.seed,
        use_parallel=config.use_parallel,
        max_device_memory=context.max_device_memory,
        graph_kernel=context.enable_graph_kernel,
        model_parallel=config.parallel_config.model_parallel,
        cpu_operators=context.cpu_operators,
        plain_operators=context.low_memory,
        graph_cache=context.graph_cache,
        bfloat16=config.model.sizes.compute_dtype == "bfloat16",
    )
    if not gc.get_freeze_count():  # MindSpore has all cycles collected before it compiles a graph: a tenth of a start
        gc.freeze()
    if runtime.is_main:
        for line in (*map(folded, config.notices()), *notices, *layout_notices(config, runtime)):
            print(line)
    return runtime


def serve_scheduler() -> int:
    """The work of msrun's scheduler, which connects the other processes and waits for them; returns the exit status."""
    device.setup("CPU", use_parallel=True)
    return 0


def sharing(config: RunConfig) -> int:
    """The number of processes that share one model."""
    return config.parallel_config.model_parallel if config.use_parallel else 1


def check_sharing(config: RunConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where the processes cannot be arranged as ``parallel_config`` asks, or not with this model."""
    asked = config.parallel_config
    n = sharing(config)
    if config.use_parallel:
        for key, value in (("pipeline_stage", asked.pipeline_stage), ("context_parallel", asked.context_parallel)):
            if value > 1:
                raise LoraMsError(f"parallel_config.{key} {value} is not supported: set it to 1 (model_parallel is)")
    odd = [f"{key} {getattr(sizes, name)}" for key, name in DIVIDED.items() if getattr(sizes, name) % n]
    if odd:
        raise LoraMsError(
            f"{MODEL_PARALLEL} {n} does not divide the model's {', '.join(odd)}: choose a number that does"
        )


def check_alone(config: RunConfig, what: str) -> None:
    """Raises LoraMsError where processes share a model, which ``what`` does not support."""
    if sharing(config) > 1:
        raise LoraMsError(
            f"{MODEL_PARALLEL} {sharing(config)}: {what} runs with the whole model in each process; set it to 1"
        )


def layout_notices(config: RunConfig, runtime: Runtime) -> list[str]:
    """How the processes share rows and model, for the user."""
    asked = config.parallel_config
    if not config.use_parallel:
        n = asked.model_parallel
        return [f"{MODEL_PARALLEL} {n} has no effect: use_parallel is False"] if n > 1 else []
    layout = f"processes: {runtime.data_ranks} data-parallel x {runtime.shard.count} model-parallel"
    other = asked.data_parallel not in (1, runtime.data_ranks)
    return [layout + (f" (parallel_config.data_parallel is {asked.data_parallel})" if other else "")]


def wait_for_all() -> None:
    """Waits for the other processes of the run."""
    device.barrier()


def check_run_output(config: RunConfig) -> None:
    """Raises LoraMsError where a run may not write to ``output_dir``: it cannot be written, another run is at it, or it
    holds what no run has written where this one would replace it. Creates nothing."""
    output_dir = Path(config.output_dir)
    check_output(output_dir)
    if output_dir.is_dir() and not config.use_parallel:  # of several processes, the main one has the lock
        with locked_output(output_dir):
            pass
    if not config.overwrite_output_dir:
        checkpoint.check_foreign(output_dir)


def check_output(output_dir: Path) -> None:
    """Raises LoraMsError where ``output_dir`` can be neither created nor written. Creates nothing.

    Checked first, so that a run does not train for hours and fail when it saves.
    """
    existing = output_dir.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise LoraMsError(f"output_dir {output_dir} cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LoraMsError(f"output_dir {output_dir} cannot be written: no permission to write in {existing}")
