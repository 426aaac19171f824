"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters import lowrank
from lora_ms.adapters.check import missing_modules
from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.inject import (
    ADAPTERS,
    TRAINED,
    InjectReport,
    adapter_cells,
    build,
    lora_layers,
    place,
    report,
    target_layers,
)
from lora_ms.adapters.matching import Place, by_pattern
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_files import (
    CONFIG,
    FACTORS,
    PREFIX,
    WEIGHTS,
    check_finite,
    check_patterns,
    read_adapter_config,
    read_entries,
    split_key,
)
from lora_ms.errors import LoraMsError, listed
from lora_ms.nn.parallel import WHOLE, Shard

Array = NDArray[np.float32]


def adapter_tensors(model: nn.Cell, config: LoraConfig, shard: Shard = WHOLE) -> dict[str, Array]:
    """Every adapter tensor under PEFT's name, float32 (shapes: ``nn.lora``), whole; all ranks of ``shard`` call it."""
    tensors: dict[str, Array] = {}
    for name, cell in adapter_cells(model).items():
        values = {factor: parameter.asnumpy() for factor, parameter in cell.tensors().items()}
        tensors |= {f"{PREFIX}{name}.{factor}": value for factor, value in packed(name, cell, values, config).items()}
    return shard.gather(tensors)


def packed(name: str, cell: nn.Cell, values: dict[str, Array], config: LoraConfig) -> dict[str, Array]:
    """``values`` of one cell as they are stored: the ranks that AdaLoRA kept, and what PiSSA changed."""
    if isinstance(config, AdaLoraConfig) and name in config.kept:
        kept = np.array(config.kept[name])
        ranks = {"lora_A": (kept,), "lora_E": (kept,), "lora_B": (slice(None), kept)}
        return {factor: value[ranks[factor]] if factor in ranks else value for factor, value in values.items()}
    if isinstance(cell, ADAPTERS) and isinstance(cell, nn.Dense) and cell.start is not None:
        a, b = lowrank.without_start(values["lora_A.weight"], values["lora_B.weight"], *cell.start)
        return {**values, "lora_A.weight": a, "lora_B.weight": b}
    return values


def unpacked(name: str, values: dict[str, Array], config: LoraConfig) -> dict[str, Array]:
    """The reverse of ``packed`` for AdaLoRA: ranks that were dropped come back as zeros."""
    if not isinstance(config, AdaLoraConfig) or name not in config.kept:
        return values
    kept, full = np.array(config.kept[name]), {}
    for factor, value in values.items():
        axis = {"lora_A": 0, "lora_E": 0, "lora_B": 1}.get(factor)
        if axis is not None and value.shape[axis] == kept.sum():
            wide = np.zeros(tuple(len(kept) if i == axis else n for i, n in enumerate(value.shape)), np.float32)
            wide[(slice(None),) * axis + (kept,)] = value
            value = wide
        full[factor] = value
    return full


def adapted(model: nn.Cell) -> Adapted:
    """What of an adapter stands in ``model``."""
    cells = adapter_cells(model)
    places = {name: Place(cell.lora_rank, cell.lora_alpha) for name, cell in lora_layers(model).items()}
    saved = tuple(name for name, cell in cells.items() if isinstance(cell, TRAINED) and "weight" in cell.tensors())
    return Adapted(places, saved, tuple(target_layers(model)))


def save_adapter(
    model: nn.Cell,
    path: str | os.PathLike,
    config: LoraConfig,
    base_model: str | None = None,
    tensors: dict[str, Array] | None = None,
) -> None:
    """Writes the adapter of ``model`` into directory ``path``, each file whole or not at all.

    tensors: what ``adapter_tensors`` returned, where layers are shared with other ranks.

    Raises:
        LoraMsError: an adapter weight is not finite (nothing is written then), or the directory cannot be written.
    """
    path, tensors = Path(path), adapter_tensors(model, config) if tensors is None else tensors
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise LoraMsError(f"{name} holds NaN or infinity; {path} was not written")
    storage.write_tensors(path / WEIGHTS, tensors)
    storage.write_json(path / CONFIG, to_peft(config, adapted(model), base_model))


def read_tensors(path: Path, shard: Shard = WHOLE) -> dict[str, Array]:
    """Every tensor of the adapter in directory ``path``, float32, by PEFT's name; this rank's part of each.

    Raises:
        LoraMsError: a truncated file, or a tensor that is not finite.
    """
    entries = read_entries(path)
    check_finite(path, entries)
    return {key: shard.part(key, storage.read(entry, np.float32)) for key, entry in entries.items()}


def load_adapter(
    model: nn.Cell, path: str | os.PathLike, lora_dropout: float | None = None, shard: Shard = WHOLE
) -> tuple[LoraConfig, InjectReport]:
    """Swaps the adapter of directory ``path`` into a bare ``model``; the layers are those that the file names.

    lora_dropout: for further training; None keeps the adapter's own.

    Raises:
        LoraMsError: the adapter was made for another model: the first tensors without a layer or of another shape
            are listed, and the model is as it was.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if lora_dropout is not None:
        config = replace(config, lora_dropout=lora_dropout)
    cells = read_cells(model, path, config, shard)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    missing = missing_modules(config, cells, target_layers(model))
    place(model, cells)
    found = report(model, shard=shard)
    if missing:
        found = replace(found, notes=(*found.notes, incomplete(path, missing)))
    return config, found


def incomplete(path: Path, missing: str) -> str:
    """What is said of an adapter that holds less than its settings name."""
    return f"warning: {path} holds nothing of {missing}, which its {CONFIG} names: these modules are the model's own"


def read_cells(model: nn.Cell, path: Path, config: LoraConfig, shard: Shard = WHOLE) -> dict[str, nn.Cell]:
    """The cells of the adapter in ``path`` by dotted path, with its numbers, not yet in ``model``.

    Raises:
        LoraMsError: see ``load_adapter``.
    """
    tensors, layers = read_tensors(path, shard), dict(model.cells_and_names())
    keys = [split_key(key) for key in tensors]
    named = [found for found in keys if found is not None and found.name in layers]
    lora = [found.name for found in named if found.factor.startswith("lora_")]
    saved = tuple(found.name for found in named if found.factor == "weight")
    check_patterns(path, config, lora)
    where = {
        name: Place(
            int(by_pattern(name, config.rank_pattern, config.lora_rank)),
            by_pattern(name, config.alpha_pattern, config.lora_alpha),
        )
        for name in lora
        if name in target_layers(model)
    }
    if not where:
        faults = [f"{key} {value.shape} has no place in the model" for key, value in tensors.items()]
        raise LoraMsError(f"{path}: made for another model: {listed(faults) or 'it holds no LoRA tensor'}")
    cells = build(model, replace(config, modules_to_save=(*config.modules_to_save, *saved)), where)
    faults = fill(cells, tensors, config, layers)
    if faults:
        raise LoraMsError(f"{path}: made for another model: {listed(faults)}")
    return cells


def fill(
    cells: Mapping[str, nn.Cell], tensors: Mapping[str, Array], config: LoraConfig, base: Mapping[str, nn.Cell]
) -> list[str]:
    """Puts ``tensors`` (by PEFT's names) into ``cells``, all or none; returns what does not fit.

    base: the bare model's cells, for copies of base weights that PEFT puts beside an adapter on the embedding.
    """
    wanted: list[tuple[Parameter, Array]] = []
    faults, known = [], set()
    for name, cell in cells.items():
        prefix = f"{PREFIX}{name}."
        stored = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        stored = {factor: value for factor, value in stored.items() if factor in FACTORS}
        known |= {prefix + factor for factor in stored}
        copy = stored.pop("base_layer.weight", None)
        if copy is not None and not _same(copy, base[name].weight):
            faults.append(f"{prefix}base_layer.weight is another than the model's")
        values, parameters = unpacked(name, stored, config), cell.tensors()
        values = split_start(cell, values)
        faults += [f"{prefix}{factor} is missing" for factor in parameters if factor not in values]
        faults += [
            f"{prefix}{factor} {values[factor].shape} has no place" for factor in values if factor not in parameters
        ]
        for factor, parameter in parameters.items():
            if factor in values and values[factor].shape != tuple(parameter.shape):
                faults.append(f"{prefix}{factor} is {stored[factor].shape}, should be {tuple(parameter.shape)}")
            elif factor in values:
                wanted.append((parameter, values[factor]))
    faults += [f"{key} {tensors[key].shape} has no place in the model" for key in tensors if key not in known]
    if not faults:
        for parameter, value in wanted:
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(value)))
    return faults


def _same(copy: Array, weight: Parameter) -> bool:
    return copy.shape == tuple(weight.shape) and np.allclose(copy, weight.asnumpy(), rtol=1e-2, atol=1e-4)


def split_start(cell: nn.Cell, values: dict[str, Array]) -> dict[str, Array]:
    """Of a pair of twice the rank, as ``packed`` writes it: the trained half; the cell starts from the other."""
    if not isinstance(cell, nn.Dense) or not isinstance(cell, ADAPTERS) or cell.start is None:
        return values
    rank, a, b = cell.lora_rank, values.get("lora_A.weight"), values.get("lora_B.weight")
    if a is None or b is None or len(a) != 2 * rank or b.shape[1] != 2 * rank:
        return values
    cell.start_again(a[rank:], -b[:, rank:])
    return {**values, "lora_A.weight": a[:rank], "lora_B.weight": b[:, :rank]}


def restore_adapter(model: nn.Cell, path: str | os.PathLike, config: LoraConfig, shard: Shard = WHOLE) -> None:
    """Reads the adapter weights of directory ``path`` into the adapter that stands in ``model``."""
    faults = fill(adapter_cells(model), read_tensors(Path(path), shard), config, dict(model.cells_and_names()))
    if faults:
        raise LoraMsError(f"{path}: not the adapter of this run: {listed(faults)}")
