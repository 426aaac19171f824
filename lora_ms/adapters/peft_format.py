"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from lora_ms import storage
from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.inject import InjectReport, check_heads, dense_layers, inject, lora_layers
from lora_ms.errors import LoraMsError

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def adapter_tensors(model: nn.Cell) -> dict[str, np.ndarray]:
    """Every adapter tensor under PEFT's name: A [rank, in] and B [out, rank], float32."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.asnumpy()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.asnumpy()
    return tensors


def save_adapter(model: nn.Cell, path: str | os.PathLike, config: LoraConfig, base_model: str | None = None) -> None:
    """Writes the adapter of ``model`` into directory ``path``, each file whole or not at all.

    Raises:
        LoraMsError: an adapter weight is not finite (nothing is written then), or the directory cannot be written.
    """
    path, tensors = Path(path), adapter_tensors(model)
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise LoraMsError(f"{name} holds NaN or infinity; {path} was not written")
    storage.write_tensors(path / WEIGHTS, tensors)
    peft = config.to_peft(list(lora_layers(model)), list(dense_layers(model)), base_model)
    storage.write_json(path / CONFIG, peft)


def read_adapter_config(path: str | os.PathLike) -> LoraConfig:
    """The settings of the adapter in directory ``path``."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise LoraMsError(f"{path}: no adapter here: {CONFIG} is missing")
    return LoraConfig.from_peft(storage.read_json(file), str(file))


def load_adapter(
    model: nn.Cell, path: str | os.PathLike, lora_dropout: float | None = None
) -> tuple[LoraConfig, InjectReport]:
    """Swaps the adapter of directory ``path`` into a bare ``model``; the layers are those that the file names.

    lora_dropout: for further training; None keeps the adapter's own.

    Raises:
        LoraMsError: the adapter was made for another model: every tensor without a layer and every shape that
            differs is listed.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if lora_dropout is not None:
        config = replace(config, lora_dropout=lora_dropout)
    names = check_tensors(path, dense_layers(model), config.lora_rank)
    report = inject(model, config, names)
    restore_adapter(model, path)
    return config, report


def check_tensors(path: Path, layers: dict[str, nn.Dense], lora_rank: int) -> list[str]:
    """Names of the layers that the adapter in ``path`` stands on, all of them among ``layers``.

    Raises:
        LoraMsError: see ``load_adapter``.
    """
    entries = storage.read_header(path / WEIGHTS)
    faults, names = [], []
    for key, entry in entries.items():
        name, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or name not in layers:
            faults.append(f"{key} {entry.shape} has no place in the model")
            continue
        layer = layers[name]
        shape = (lora_rank, layer.in_channels) if factor == "lora_A" else (layer.out_channels, lora_rank)
        if entry.shape != shape:
            faults.append(f"{key} is {entry.shape}, should be {shape}")
        if name not in names:
            names.append(name)
    wanted = [f"{PREFIX}{name}.{factor}.weight" for name in names for factor in ("lora_A", "lora_B")]
    faults += [f"{key} is missing" for key in wanted if key not in entries]
    if faults or not names:
        raise LoraMsError(f"{path}: made for another model: {'; '.join(faults) or 'it holds no LoRA tensor'}")
    check_heads(names)
    for key in wanted:
        if not np.isfinite(storage.read(entries[key], np.float32)).all():
            raise LoraMsError(f"{path}: {key} holds NaN or infinity")
    return names


def restore_adapter(model: nn.Cell, path: str | os.PathLike) -> None:
    """Reads the adapter weights of directory ``path`` into the adapters that stand in ``model``."""
    entries = storage.read_header(Path(path) / WEIGHTS)
    for name, layer in lora_layers(model).items():
        for factor, parameter in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
            key = f"{PREFIX}{name}.{factor}.weight"
            parameter.set_data(Tensor.from_numpy(storage.read(entries[key], np.float32)))
