"""What a directory in PEFT's format holds, read without MindSpore."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_ms import storage
from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.matching import by_pattern
from lora_ms.adapters.peft_config import from_peft
from lora_ms.errors import LoraMsError

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# ends of a tensor's name behind the module's path, an end before those that it ends with
FACTORS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer.bias",
    "base_layer.weight",
    "weight",
    "bias",
)


OTHER_SPELLINGS = (  # names that PEFT reads as well: of a running model, where an adapter's own name is in them
    (re.compile(r"\.(lora_[AB])\.default\.(weight|bias)$"), r".\1.\2"),
    (re.compile(r"\.(lora_[ABE]|lora_embedding_[AB])\.default$"), r".\1"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), ".lora_magnitude_vector"),
)


class Key(NamedTuple):
    """A tensor's name taken apart: the module's dotted path, and which of its tensors."""

    name: str
    factor: str


def split_key(key: str) -> Key | None:
    """None where ``key`` ends as no tensor of an adapter does."""
    path = key.removeprefix(PREFIX)
    for factor in FACTORS:
        if path.endswith("." + factor):
            return Key(path[: -len(factor) - 1], factor)
    return None


def usual_key(key: str) -> str:
    """``key`` as PEFT writes it: ``lora_A.weight`` for ``lora_A.default.weight``."""
    for spelling, usual in OTHER_SPELLINGS:
        key = spelling.sub(usual, key)
    return key


def read_adapter_config(path: str | os.PathLike) -> LoraConfig:
    """The settings of the adapter in directory ``path``."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise LoraMsError(f"{path}: no adapter here: {CONFIG} is missing")
    return from_peft(storage.read_json(file), str(file))


def read_entries(path: Path) -> dict[str, storage.Entry]:
    """Where the tensors of the adapter in directory ``path`` lie, by the names that PEFT writes.

    Raises:
        LoraMsError: no file, another format, a file cut short, or one tensor under two spellings.
    """
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise LoraMsError(f"{path}: adapter_model.bin is not read: save the adapter as {WEIGHTS}")
    entries: dict[str, storage.Entry] = {}
    for key, entry in storage.read_header(path / WEIGHTS).items():
        if usual_key(key) in entries:
            raise LoraMsError(f"{path / WEIGHTS}: {usual_key(key)} is there twice, once as {key}")
        entries[usual_key(key)] = entry
    return entries


def check_finite(path: Path, entries: dict[str, storage.Entry]) -> None:
    """Raises LoraMsError where a tensor of the adapter in ``path`` holds NaN or infinity."""
    for key, entry in entries.items():
        if not all(np.isfinite(block).all() for block in storage.read_blocks(entry)):
            raise LoraMsError(f"{path}: {key} holds NaN or infinity")


def check_patterns(path: Path, config: LoraConfig, names: list[str]) -> None:
    """Raises LoraMsError where a rank or alpha pattern of the file fits none of its own modules."""
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(by_pattern(name, {pattern: 1.0}, 0.0) for name in names):
                raise LoraMsError(f"{path}: {key} {pattern!r} matches none of the adapter's modules")


def base_name(path: Path) -> str | None:
    """The model that the adapter in directory ``path`` names as its own."""
    name = storage.read_json(path / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
