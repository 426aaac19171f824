"""``lora-ms finetune``: from a model and a file of rows to an adapter."""

import shlex
import sys
import time
from importlib import import_module
from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.estimate import size
from lora_ms.recipes.train import PreparedRun, closing_lines, train
from lora_ms.runtime.device import peak_memory_mb
from lora_ms.train.log import Tee

BACKENDS = {"native": "lora_ms.recipes.native", "mindformers": "lora_ms.recipes.mindformers"}


def run(config: RunConfig) -> None:
    """Trains as ``config`` says; outputs under ``output_dir`` as the README lists them.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    begun = time.monotonic()
    backend = import_module(BACKENDS[config.backend])
    inputs = backend.read_inputs(config)
    with Tee() as log:
        prepared: PreparedRun = backend.prepare(inputs, log)
        outcome = train(prepared)
        if prepared.runtime.is_main:
            print(*closing_lines(prepared, outcome), sep="\n")
            if not outcome.stopped:
                print(*next_lines(config, prepared, time.monotonic() - begun), sep="\n")
    if outcome.stopped:
        sys.exit(130)


def next_lines(config: RunConfig, prepared: PreparedRun, seconds: float) -> list[str]:
    """What a run took, and commands that use its result."""
    minutes = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    peak = size(peak_memory_mb(prepared.runtime.device))
    lines = [f"{minutes} in all, {peak} of memory at the peak"]
    output, base = shlex.quote(config.output_dir), shlex.quote(config.load_checkpoint)
    if config.pet_config is None:
        return [*lines, f"next: lora-ms chat --load_checkpoint {output}/model"]
    if not Path(config.load_checkpoint).is_dir():
        return lines
    merge = f"lora-ms merge --load_adapter {output}/adapter --output_dir {output}/merged"
    tools = []
    if (Path(config.output_dir) / "adapter" / "tokenizer_config.json").is_file():
        tools.append(f"lora-ms chat --load_checkpoint {base} --load_adapter {output}/adapter")
    if adapter_config(config.pet_config).merges:
        tools.append(merge)
    return [*lines, *(f"{'next:' if tool is tools[0] else '     '} {tool}" for tool in tools)]
