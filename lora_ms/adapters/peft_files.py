"""What a directory in PEFT's format holds, read without MindSpore."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lora_ms import storage
from lora_ms.adapters.matching import fits_end
from lora_ms.adapters.methods import METHODS, modules_to_save
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.peft_config import from_peft
from lora_ms.errors import LoraMsError
from lora_ms.folder_schema import AdapterJson, check, with_keys
from lora_ms.quant.settings import Quantisation, read_quantisation
from lora_ms.reading import CONFIG_SIZE, member, read_json

Stored = TypeVar("Stored")
ROOT = "base_model."  # before the name of a tensor that all modules share
PREFIX = "base_model.model."  # PEFT wraps the model twice, and keeps both attributes in the tensors' names
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = re.compile(r"adapter_(model\.safetensors|config\.json)")  # what another adapter in the folder replaces
CONFIG = "adapter_config.json"
BASE_QUANTIZATION = "base_quantization.json"  # ours: how the weights were quantised that the adapter was trained on


def check_output(output: Path, overwrite: bool) -> None:
    """Raises LoraMsError where ``output`` is a file, or an adapter would be written over another in this folder."""
    if output.is_file():
        raise LoraMsError(f"cannot write {output}: it is a file; give a folder")
    if not overwrite and any((output / name).exists() for name in (CONFIG, WEIGHTS)):
        raise LoraMsError(f"{output} holds an adapter: give another folder, or --overwrite True")


# names that PEFT reads as well: a running model's, in which the adapter is called "default"
OTHER_SPELLINGS = (
    (re.compile(r"\.(lora_[AB])\.default\.(weight|bias)$"), r".\1.\2"),
    (re.compile(r"\.(lora_[ABE]|lora_embedding_[AB]|token_adapter\.trainable_tokens_delta)\.default$"), r".\1"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), ".lora_magnitude_vector"),
)


def _tensor_names() -> tuple[str, ...]:
    """All names that a module's tensors may have, a name before those that it ends with."""
    names = {name for method in METHODS.values() for name in (*method.TENSORS, *method.BESIDE_TENSORS)}
    # PEFT puts the untouched weight beside an adapter on the head or the embedding, and trained biases into base_layer
    names |= {*modules_to_save.TENSORS, *(f"base_layer.{name}" for name in modules_to_save.TENSORS)}
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


TENSOR_NAMES = _tensor_names()
ROOT_KEYS = {key: module for method in METHODS.values() for key, module in method.ROOT_TENSORS.items()}
SHARED_KEYS = {f"{ROOT}{name}": name for method in METHODS.values() for name in method.SHARED_TENSORS}
AdapterFile = with_keys(
    AdapterJson, {name: kind for method in METHODS.values() for name, kind in method.PEFT_KEYS.items()}
)


def base_quantisation(path: Path) -> Quantisation | None:
    """How the weights were quantised that the adapter in directory ``path`` was trained on; None: not by us.

    Raises:
        LoraMsError: another kind of four bits, or a file that cannot be read.
    """
    if not (path / BASE_QUANTIZATION).is_file():
        return None
    try:
        return read_quantisation(read_json(member(path, BASE_QUANTIZATION), CONFIG_SIZE))
    except ValueError as problem:
        raise LoraMsError(f"{path / BASE_QUANTIZATION}: {problem}") from None


class TensorKey(NamedTuple):
    """A key of the file taken apart: the module's dotted path, and which of its tensors."""

    module: str
    tensor: str


def split_key(key: str) -> TensorKey | None:
    """The parts of ``key``; None if it does not end like a tensor of an adapter.

    A path may itself hold "weight" or "lora_A", so the names are matched at the end alone, the longest first.
    """
    if key in ROOT_KEYS:
        return TensorKey(ROOT_KEYS[key], key)
    path = key.removeprefix(PREFIX)
    for tensor in TENSOR_NAMES:
        if path.endswith("." + tensor):
            return TensorKey(path[: -len(tensor) - 1], tensor)
    return None


def by_module(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """The tensors of a file by module and name, those that modules share in each; unknown names are left out."""
    modules: dict[str, dict[str, Stored]] = {}
    for key, value in tensors.items():
        found = None if key in SHARED_KEYS else split_key(key)
        if found is not None:
            modules.setdefault(found.module, {})[found.tensor] = value
    shared = {name: tensors[key] for key, name in SHARED_KEYS.items() if key in tensors}
    owners = [method for method in METHODS.values() if not shared.keys().isdisjoint(method.SHARED_TENSORS)]
    for own in modules.values():
        if any(tensor in own for method in owners for tensor in method.TENSORS):
            own |= shared
    return modules


def key_of(module: str, tensor: str) -> str:
    """The reverse of ``split_key``, also of a tensor that modules share."""
    if ROOT_KEYS.get(tensor) == module:
        return tensor
    shared = f"{ROOT}{tensor}"
    return shared if shared in SHARED_KEYS else f"{PREFIX}{module}.{tensor}"


def usual_key(key: str) -> str:
    """``key`` as PEFT writes it: ``lora_A.weight`` for ``lora_A.default.weight``."""
    for spelling, usual in OTHER_SPELLINGS:
        key = spelling.sub(usual, key)
    return key


def usual_keys(keys: Iterable[str]) -> dict[str, str]:
    """``usual_key`` of each of a file's; of the bias of a layer with LoRA, which PEFT before 0.6 had as the layer's own
    and not in ``base_layer``, that of today."""
    usual = {key: usual_key(key) for key in keys}
    split = {key: split_key(new) for key, new in usual.items()}
    adapted = {found.module for found in split.values() if found is not None and found.tensor.startswith("lora_")}
    for key, found in split.items():
        if found is not None and found.tensor == "bias" and found.module in adapted:
            usual[key] = key_of(found.module, "base_layer.bias")
    return usual


def check_adapter_folder(path: Path, given_as: str = "load_adapter") -> None:
    """Raises LoraMsError where ``path``, the value of the flag ``given_as``, is not a folder."""
    if not path.is_dir():
        fault = "is not a folder" if path.exists() else "does not exist"
        raise LoraMsError(f"{given_as}: {path} {fault}; give the folder that holds {CONFIG}")


def read_adapter_config(path: str | os.PathLike) -> AdapterConfig:
    """The settings of the adapter in directory ``path``."""
    path = Path(path)
    check_adapter_folder(path)
    if not (path / CONFIG).is_file():
        raise LoraMsError(f"{path}: no adapter here: {CONFIG} is missing")
    return from_peft(read_settings(path), str(path / CONFIG))


def read_settings(path: Path) -> dict[str, Any]:
    """adapter_config.json of directory ``path``, its values of the right types and within bounds."""
    return check(AdapterFile, read_json(member(path, CONFIG), CONFIG_SIZE), path / CONFIG)


def read_entries(path: Path) -> dict[str, storage.Entry]:
    """Where the tensors of the adapter in directory ``path`` lie, by the names that PEFT writes.

    Raises:
        LoraMsError: no file, another format, a file cut short, or one tensor under two spellings.
    """
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise LoraMsError(f"{path}: adapter_model.bin is not read: save the adapter as {WEIGHTS}")
    entries: dict[str, storage.Entry] = {}
    header = storage.read_header(member(path, WEIGHTS))
    for key, usual in usual_keys(header).items():
        if usual in entries:
            raise LoraMsError(f"{path / WEIGHTS}: {usual} is there twice, once as {key}")
        entries[usual] = header[key]
    return entries


def check_finite(path: Path, entries: dict[str, storage.Entry]) -> None:
    """Raises LoraMsError where a tensor of the adapter in ``path`` holds NaN or infinity."""
    for key, entry in entries.items():
        if not all(np.isfinite(block).all() for block in storage.read_blocks(entry)):
            raise LoraMsError(f"{path}: {key} holds NaN or infinity")


def check_patterns(path: Path, config: AdapterConfig, names: list[str]) -> None:
    """Raises LoraMsError where a pattern of the file, such as a rank's, matches none of its own modules ``names``."""
    for key, patterns in config.patterns().items():
        for pattern in patterns:
            if not any(fits_end(name, pattern) for name in names):
                raise LoraMsError(f"{path}: {key} {pattern!r} matches none of the adapter's modules")


def base_name(path: Path) -> str | None:
    """The model that the adapter in directory ``path`` names as its own."""
    return read_settings(path).get("base_model_name_or_path") or None
