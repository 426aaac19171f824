"""``lora-ms finetune``: from a model and a file of rows to an adapter."""

import sys
from importlib import import_module

from lora_ms.config import RunConfig
from lora_ms.recipes.train import PreparedRun, closing_lines, train
from lora_ms.train.log import Tee

BACKENDS = {"native": "lora_ms.recipes.native", "mindformers": "lora_ms.recipes.mindformers"}


def run(config: RunConfig) -> None:
    """Trains as ``config`` says; outputs under ``output_dir`` as the README lists them.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    backend = import_module(BACKENDS[config.backend])
    inputs = backend.read_inputs(config)
    with Tee() as log:
        prepared: PreparedRun = backend.prepare(inputs, log)
        outcome = train(prepared)
        if prepared.runtime.is_main:
            print(*closing_lines(prepared, outcome), sep="\n")
    if outcome.stopped:
        sys.exit(130)
