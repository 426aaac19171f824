"""Reading a model's weights while Python imports MindSpore, which takes it a second or two."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np

from lora_ms import hf_folder, weights
from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.runtime import host
from lora_ms.runtime.choice import chosen, default_dtype

COMMANDS = ("finetune", "predict", "chat", "serve", "eval", "fisher", "sequence")  # that begin with a whole model
DTYPES = {"float32": np.float32, "float16": np.float16}
SHARE = 0.5  # of the memory that is free, which they may take before the run has said what it needs


def begin(config: RunConfig, command: str) -> None:
    """Begins to read the model that ``command`` will compute with, where one process will have the whole as it is in
    ``load_checkpoint``. What is wrong with it is left for those who ask for it."""
    dtype = DTYPES.get(config.model.sizes.compute_dtype or default_dtype(chosen(config.context.device_target)))
    path = Path(config.load_checkpoint)
    quantises = config.model.sizes.quantization_config is not None
    if command not in COMMANDS or dtype is None or not config.load_checkpoint or not path.is_dir():
        return
    if quantises or config.use_parallel or config.backend != "native":
        return
    try:
        folder = hf_folder.open_model(path, hf_folder.model_config(path))
    except (LoraMsError, OSError):
        return
    layers = [] if config.pet_config is None else config.pet_config.layer_groups
    if folder.quantised or any(group.bits is not None for group in layers):
        return
    entries = list(folder.entries.values())
    size = sum(math.prod(entry.shape) for entry in entries) * np.dtype(dtype).itemsize
    if size <= SHARE * host.available() * host.MB:
        with suppress(MemoryError):  # a limit of the process
            weights.read_ahead(entries, dtype)


def end() -> None:
    """Nothing more is read, and what was is given back, where nobody asked for it."""
    weights.forget_ahead()
