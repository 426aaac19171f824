"""The weights that a model and an adapter amount to, from their files to the blocks of rows that are written.

Neither MindSpore nor the model is needed: names, shapes and the adapter's settings say all.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters.methods import modules_to_save
from lora_ms.adapters.methods.base import AdapterConfig, Shape, Update
from lora_ms.adapters.peft_files import (
    PREFIX,
    SHARED_KEYS,
    TensorKey,
    by_module,
    check_finite,
    check_patterns,
    read_adapter_config,
    read_entries,
    split_key,
)
from lora_ms.errors import LoraMsError
from lora_ms.storage import Entry, Planned
from lora_ms.text import listed

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{HEAD}.weight", f"{EMBEDDING}.weight"
Tensors = Mapping[str, Entry]  # of one module, by name


class Decoded(NamedTuple):
    """A weight that is not stored as it is merged into."""

    dtype: str  # safetensors' name of the type that it had before it was quantised
    numbers: Callable[[], NDArray]  # [out, in] float32


NOTHING_DECODED: Mapping[str, Decoded] = {}


def expected_shapes(
    name: str, found: Mapping[str, Shape], weight: Shape, has_bias: bool, config: AdapterConfig
) -> dict[str, Shape]:
    """Names and shapes of the tensors that module ``name``, of a weight of this shape, must have in the file, given
    those that are ``found`` there."""
    if config.knows(found):
        return config.shapes(name, found, weight, has_bias)
    return modules_to_save.shapes(found, weight, has_bias)


def same_copy(copy: Entry, base: Entry) -> bool:
    """Whether an adapter's copy of a base weight is the model's, but for rounding."""
    blocks = zip(storage.read_blocks(copy), storage.read_blocks(base), strict=False)
    return copy.shape == base.shape and all(np.allclose(x, y, rtol=1e-2, atol=1e-4) for x, y in blocks)


def module_faults(name: str, tensors: Tensors, base: Mapping[str, Shape], config: AdapterConfig) -> list[str]:
    """Why the tensors of one module do not fit the module of ``base`` by their shapes; empty where they do."""
    weight, prefix = base[f"{name}.weight"], f"{PREFIX}{name}."
    found = {tensor: entry.shape for tensor, entry in tensors.items()}
    expected = expected_shapes(name, found, weight, f"{name}.bias" in base, config)
    if "base_layer.weight" in tensors:
        expected["base_layer.weight"] = weight
    faults = [f"{prefix}{tensor} is missing" for tensor in expected if tensor not in found]
    faults += [f"{prefix}{tensor} {found[tensor]} has no place" for tensor in found if tensor not in expected]
    faults += [
        f"{prefix}{tensor} is {found[tensor]}, should be {shape}"
        for tensor, shape in expected.items()
        if tensor in found and found[tensor] != shape
    ]
    return faults


def weight_shapes(base: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a model's matrices, by module."""
    return {key.removesuffix(".weight"): shape for key, shape in base.items() if len(shape) == 2}


def shapes(tensors: Mapping[str, Entry]) -> dict[str, Shape]:
    """By the names of the tensors."""
    return {key: entry.shape for key, entry in tensors.items()}


def fit_faults(entries: Mapping[str, Entry], base: Mapping[str, Entry], config: AdapterConfig) -> list[str]:
    """Every tensor of the adapter that does not fit ``base``, by its shape, or as a copy of another weight."""
    return shape_faults(entries, shapes(base), config) or [
        f"{PREFIX}{name}.base_layer.weight is another than the model's"
        for name, tensors in by_module(entries).items()
        if "base_layer.weight" in tensors and not same_copy(tensors["base_layer.weight"], base[f"{name}.weight"])
    ]


def made_for_another(path: Path, faults: list[str], config: AdapterConfig) -> str:
    """What is said of the adapter in ``path`` that has ``faults``, or nothing of its kind."""
    return f"{path}: made for another model: {listed(faults, most=3) or f'it holds no {config.title} tensor'}"


def shape_faults(entries: Mapping[str, Entry], base: Mapping[str, Shape], config: AdapterConfig) -> list[str]:
    """Every tensor of the adapter that has no place in a model of these shapes, or another shape than its place."""
    known: dict[str, TensorKey | None] = {key: split_key(key) for key in entries}
    faults = [
        f"{key} {entries[key].shape} has no place in the model"
        for key, found in known.items()
        if key not in SHARED_KEYS and (found is None or f"{found.module}.weight" not in base)
    ]
    config = config.fitted(weight_shapes(base))
    for name, tensors in by_module(entries).items():
        if f"{name}.weight" in base:
            faults += module_faults(name, tensors, base, config)
    return faults


def read_updates(path: Path, base: Mapping[str, Entry]) -> dict[str, Update]:
    """What the adapter in directory ``path`` makes of the modules of ``base``, by dotted path.

    base: the model's tensors; ``with_head`` has those of a tied one.

    Raises:
        LoraMsError: no adapter, an unsupported kind, numbers that are not finite, or another model's adapter: the
            first tensors without a place or of another shape are listed.
    """
    config, entries = read_adapter_config(path), read_entries(path)
    modules = by_module(entries)
    adapted = [name for name, tensors in modules.items() if config.adapts(tensors)]
    check_patterns(path, config, adapted)
    faults = fit_faults(entries, base, config)
    if faults or not adapted:
        raise LoraMsError(made_for_another(path, faults, config))
    config = config.fitted(weight_shapes(shapes(base)))
    updates = {name: update_of(name, tensors, config) for name, tensors in modules.items()}
    shared = updates.get(EMBEDDING)
    if shared is not None and shared.reaches_tied_head and base[EMBEDDING_WEIGHT] == base.get(HEAD_WEIGHT):
        updates.setdefault(HEAD, shared)
    bare = [name for name, update in updates.items() if update.adds_bias and f"{name}.bias" not in base]
    if bare:
        option = updates[bare[0]].adds_bias
        raise LoraMsError(
            f"{path}: {option} cannot be merged into layers that have no bias: {bare[0]} and {len(bare) - 1} others"
        )
    check_finite(path, entries)
    return updates


def update_of(name: str, tensors: Tensors, config: AdapterConfig) -> Update:
    """The update of one module by the adapter's settings."""
    return config.update(name, tensors) if config.knows(tensors) else modules_to_save.WholeUpdate(tensors)


def with_head(base: Mapping[str, Entry], tied: bool) -> dict[str, Entry]:
    """``base`` with the head that a tied model does not store, or stores a copy of."""
    shared = base.get(EMBEDDING_WEIGHT)
    return {**base, HEAD_WEIGHT: shared} if tied and shared is not None else dict(base)


def still_tied(updates: Mapping[str, Update]) -> bool:
    """Whether head and embedding, one tensor before, are one after."""
    if HEAD not in updates or EMBEDDING not in updates:
        return HEAD not in updates and EMBEDDING not in updates
    return updates[HEAD].keeps_tie(updates[EMBEDDING])


def plan(
    base: Mapping[str, Entry],
    updates: Mapping[str, Update],
    dtype: str | None,
    safe: bool,
    decoded: Mapping[str, Decoded] = NOTHING_DECODED,
) -> dict[str, Planned]:
    """The tensors of the merged model in the order of ``base``.

    dtype: safetensors' name of the type to write; None for each tensor's own.
    safe: blocks that are not finite as they are written raise LoraMsError.
    decoded: weights whose numbers come from elsewhere than from their place in ``base``.
    """
    planned = {}
    for key, entry in base.items():
        if key in decoded:
            entry = entry._replace(dtype=decoded[key].dtype)
        if entry.dtype not in storage.DTYPES:
            raise LoraMsError(f"{entry.file}: {key} is of type {entry.dtype}, which is not supported")
        name, _, leaf = key.rpartition(".")
        update, target = updates.get(name), dtype or entry.dtype
        if update is not None and not (update.changes_weight if leaf == "weight" else update.changes_bias):
            update = None
        read = partial(_rows_of_decoded, decoded[key]) if key in decoded else None
        planned[key] = Planned(target, entry.shape, _blocks(key, entry, update, target, safe=safe, read=read))
    return planned


def _rows_of_decoded(weight: Decoded) -> Callable[[slice], NDArray]:
    numbers = weight.numbers()
    return lambda rows: numbers[rows]


def _rows_of_stored(entry: Entry) -> Callable[[slice], NDArray]:
    return lambda rows: storage.read(storage.rows_of(entry, rows.start, rows.stop), np.float32)


def _blocks(
    key: str,
    entry: Entry,
    update: Update | None,
    dtype: str,
    *,
    safe: bool,
    read: Callable[[], Callable[[slice], NDArray]] | None,
):
    def stored() -> Iterator[NDArray]:
        # what stays as it is is copied word by word
        yield from storage.read_words(entry)

    def computed() -> Iterator[NDArray]:
        rows = _rows_of_stored(entry) if read is None else read()
        values: Iterator[NDArray]
        if update is None and read is not None:
            values = (rows(block) for block in storage.row_blocks(entry.shape))
        elif update is None:
            values = storage.read_blocks(entry)
        elif key.endswith(".bias"):
            values = iter([update.bias(storage.read(entry, np.float32))])
        else:
            values = update.blocks(entry.shape, rows)
        for block in values:
            words = storage.encoded(block, dtype)
            if safe and not np.isfinite(block).all():
                raise LoraMsError(f"the merged {key} holds NaN or infinity; nothing was written")
            if safe and dtype == "F16" and not np.isfinite(words).all():
                raise LoraMsError(f"{key} is out of float16's range: merge with --dtype bfloat16 or float32")
            yield words

    return stored if update is None and dtype == entry.dtype and read is None else computed
