"""Adapters in PEFT's format, from and to a model: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.adapters.check import missing_modules
from lora_ms.adapters.inject import (
    InjectReport,
    adapted_layers,
    adapter_cells,
    build,
    cells_of,
    freeze_all,
    install,
    report,
    target_layers,
)
from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.adapters.offline_merge import made_for_another
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_files import (
    ADAPTER_FILES,
    BASE_QUANTIZATION,
    CONFIG,
    PREFIX,
    SHARED_KEYS,
    WEIGHTS,
    by_module,
    check_finite,
    check_patterns,
    key_of,
    read_adapter_config,
    read_entries,
    split_key,
)
from lora_ms.errors import LoraMsError
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.ops import PORTABLE, Operators
from lora_ms.text import listed

Array = NDArray[np.float32]


def stored_tensors(model: nn.Cell, config: AdapterConfig) -> dict[str, dict[str, Array]]:
    """What the file gets of every adapter cell: numbers by module and tensor (shapes: ``AdapterConfig.shapes``)."""
    return {name: config.pack(name, cell.export()) for name, cell in adapter_cells(model).items()}


def by_key(modules: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Numbers by PEFT's keys, from those by module and tensor; what modules share stands there once."""
    return {key_of(name, tensor): value for name, tensors in modules.items() for tensor, value in tensors.items()}


def adapter_tensors(model: nn.Cell, config: AdapterConfig, shard: Shard = WHOLE) -> dict[str, Array]:
    """Every adapter tensor by PEFT's key, float32, whole; all processes of ``shard`` call it."""
    return shard.gather(by_key(stored_tensors(model, config)))


def adapted(model: nn.Cell) -> Adapted:
    """The adapter that is installed in ``model``."""
    cells = adapter_cells(model)
    return Adapted(
        specs={name: cell.spec for name, cell in adapted_layers(model).items()},
        saved=tuple(name for name, cell in cells.items() if cell.spec is None and "weight" in cell.tensors()),
        plain=(*target_layers(model), *(name for name, cell in cells.items() if _trains_bias_alone(cell))),
    )


def _trains_bias_alone(cell: AdapterCell) -> bool:
    return cell.spec is None and set(cell.tensors()) == {"bias"}


def save_adapter(
    model: nn.Cell,
    path: str | os.PathLike,
    config: AdapterConfig,
    base_model: str | None = None,
    tensors: dict[str, Array] | None = None,
    base_quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes the adapter of ``model`` into directory ``path``, each file atomically.

    tensors: what ``adapter_tensors`` returned, where layers are shared with other processes.
    base_quantization: transformers' ``quantization_config`` of the model; None where its weights are whole.

    Raises:
        LoraMsError: an adapter weight is not finite (nothing is written then), or the directory cannot be written.
    """
    path, tensors = Path(path), adapter_tensors(model, config) if tensors is None else tensors
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise LoraMsError(f"{name} holds NaN or infinity; {saving.final_of(path)} was not written")
    storage.write_tensors(path / WEIGHTS, tensors)
    storage.write_json(path / CONFIG, to_peft(config, adapted(model), base_model))
    if base_quantization is not None:
        storage.write_json(path / BASE_QUANTIZATION, base_quantization)


def save_as_lora(
    model: nn.Cell,
    path: Path,
    config: AdapterConfig,
    base_model: str | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> bool:
    """Writes the adapter of ``model`` into directory ``path`` as plain LoRA; False where it has no such form.

    add: writes what is to stand beside it.
    """
    modules, found = stored_tensors(model, config), adapted(model)
    form = config.as_lora({name: modules.pop(name) for name in found.specs})
    if form is None:
        return False
    lora, specs, tensors = form
    left_out = tuple(name for name in found.specs if name not in specs)
    written = Adapted(specs, found.saved, (*found.plain, *left_out))
    with saving.new_folder(path, replaced=ADAPTER_FILES) as part:
        storage.write_tensors(part / WEIGHTS, by_key({**modules, **tensors}))
        storage.write_json(part / CONFIG, to_peft(lora, written, base_model))
        add(part)
    return True


def read_tensors(path: Path, shard: Shard = WHOLE) -> dict[str, Array]:
    """Every tensor of the adapter in directory ``path``, float32, by PEFT's key; this process's part of each.

    Raises:
        LoraMsError: a truncated file, or a tensor that is not finite.
    """
    entries = read_entries(path)
    check_finite(path, entries)
    return {key: shard.part(key, storage.read(entry, np.float32)) for key, entry in entries.items()}


def load_adapter(
    model: nn.Cell,
    path: str | os.PathLike,
    config: AdapterConfig | None = None,
    shard: Shard = WHOLE,
    operators: Operators = PORTABLE,
) -> tuple[AdapterConfig, InjectReport]:
    """Puts the adapter of directory ``path`` into a bare ``model``, on the layers that the file names.

    Args:
        config: in place of the file's own settings, for further training.
        shard: with which processes the layers are shared.
        operators: what adapters on layers that are no projections compute with.

    Raises:
        LoraMsError: the adapter was made for another model: the first tensors without a layer or of another shape
            are listed, and the model is as it was.
    """
    path = Path(path)
    config = read_adapter_config(path) if config is None else config
    cells = read_cells(model, path, config, shard, operators)
    missing = missing_modules(config, cells, target_layers(model))
    freeze_all(model)
    install(model, cells)
    found = report(model, shard=shard)
    if missing:
        found = replace(found, notes=(*found.notes, incomplete(path, missing)))
    return config, found


def incomplete(path: Path, missing: str) -> str:
    """What is said of an adapter that holds less than its settings name."""
    return f"warning: {path} holds nothing of {missing}, which its {CONFIG} names: these modules are the model's own"


def read_cells(
    model: nn.Cell, path: Path, config: AdapterConfig, shard: Shard = WHOLE, operators: Operators = PORTABLE
) -> dict[str, nn.Cell]:
    """The cells of the adapter in ``path`` by dotted path, with its numbers, not yet in ``model``.

    Raises:
        LoraMsError: see ``load_adapter``.
    """
    tensors, layers = read_tensors(path, shard), cells_of(model)
    keys = [split_key(key) for key in tensors]
    known = [found for found in keys if found is not None and found.module in layers]
    named = [found.module for found in known if config.adapts([found.tensor])]
    saved = tuple(found.module for found in known if found.tensor == "weight")
    check_patterns(path, config, named)
    targets = target_layers(model)
    specs = {name: config.spec(name) for name in named if name in targets}
    if not specs:
        faults = [f"{key} {value.shape} has no place in the model" for key, value in tensors.items()]
        raise LoraMsError(made_for_another(path, faults, config))
    with_saved = replace(config, modules_to_save=(*config.modules_to_save, *saved))
    cells = build(model, with_saved, specs, operators=operators)
    faults = fill(cells, tensors, config, layers)
    if faults:
        raise LoraMsError(made_for_another(path, faults, config))
    return cells


def fill(
    cells: Mapping[str, nn.Cell], tensors: Mapping[str, Array], config: AdapterConfig, base: Mapping[str, nn.Cell]
) -> list[str]:
    """Puts ``tensors`` (by PEFT's keys) into ``cells``, all or none; returns what does not fit.

    base: the layers under ``cells``, for copies of their weights that PEFT puts beside an adapter on the embedding.
    """
    modules, faults, unknown = by_module(tensors), [], []
    for key, value in tensors.items():
        found = split_key(key)
        if key not in SHARED_KEYS and (found is None or found.module not in cells):
            unknown.append(f"{key} {value.shape} has no place in the model")
    numbers: list[tuple[Parameter, Array]] = []
    for name, cell in cells.items():
        misfits, fitting = fit_module(name, cell, modules.get(name, {}), config, base)
        faults += misfits
        numbers += fitting
    faults += unknown
    if not faults:
        for parameter, value in numbers:
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(value)))
    return faults


def fit_module(
    name: str, cell: AdapterCell, stored: dict[str, Array], config: AdapterConfig, base: Mapping[str, nn.Cell]
) -> tuple[list[str], list[tuple[Parameter, Array]]]:
    """What of the ``stored`` tensors of module ``name`` does not fit its cell, and the numbers of the parameters that
    it fits."""
    prefix = f"{PREFIX}{name}."
    faults, numbers = [], []
    copy = stored.pop("base_layer.weight", None)
    if copy is not None and not _same(copy, base[name].weight):
        faults.append(f"{prefix}base_layer.weight is another than the model's")
    values, parameters = cell.accept(config.unpack(name, stored)), cell.tensors()
    faults += [f"{prefix}{tensor} is missing" for tensor in parameters if tensor not in values]
    faults += [f"{prefix}{tensor} {values[tensor].shape} has no place" for tensor in values if tensor not in parameters]
    for tensor, parameter in parameters.items():
        if tensor in values and values[tensor].shape != tuple(parameter.shape):
            shape = stored.get(tensor, values[tensor]).shape
            faults.append(f"{prefix}{tensor} is {shape}, should be {tuple(parameter.shape)}")
        elif tensor in values:
            numbers.append((parameter, values[tensor]))
    return faults, numbers


def _same(copy: Array, weight: Parameter) -> bool:
    return copy.shape == tuple(weight.shape) and np.allclose(copy, weight.asnumpy(), rtol=1e-2, atol=1e-4)


def restore_adapter(model: nn.Cell, path: str | os.PathLike, config: AdapterConfig, shard: Shard = WHOLE) -> None:
    """Reads the adapter weights of directory ``path`` into the adapter that is installed in ``model``."""
    cells = adapter_cells(model)
    base = {name: cell.base for name, cell in cells.items()}
    faults = fill(cells, read_tensors(Path(path), shard), config, base)
    if faults:
        raise LoraMsError(f"{path}: not the adapter of this run: {listed(faults, most=3)}")
