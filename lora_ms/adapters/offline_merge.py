"""The weights that a model and an adapter amount to, from their files to the blocks of rows that are written.

Neither MindSpore nor the model is needed: names, shapes and the adapter's settings say all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters import lowrank
from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.matching import by_pattern
from lora_ms.adapters.peft_files import (
    PREFIX,
    Key,
    check_finite,
    check_patterns,
    read_adapter_config,
    read_entries,
    split_key,
)
from lora_ms.errors import LoraMsError, listed
from lora_ms.storage import Entry, Planned

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
Array = NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """What an adapter makes of one module: its tensors by factor, and how to apply them.

    start: ``init_lora_weights`` of PiSSA and OLoRA, whose first factors are taken out of the weight; "" for others.
    """

    tensors: Mapping[str, Entry]
    lora_rank: int
    scaling: float
    start: str = ""
    read: dict[str, Array] = field(default_factory=dict)  # the small ones, once they are needed

    def tensor(self, factor: str) -> Array:
        if factor not in self.read:
            self.read[factor] = storage.read(self.tensors[factor], np.float32)
        return self.read[factor]

    @property
    def changes_weight(self) -> bool:
        return any(factor == "weight" or factor.startswith("lora_") for factor in self.tensors)

    @property
    def changes_bias(self) -> bool:
        return any(factor.endswith("bias") for factor in self.tensors)

    @property
    def by_rows(self) -> bool:
        """Whether a row of the merged weight depends on the same row of the weight alone."""
        embedded = "lora_embedding_A" in self.tensors
        return not self.start and not (embedded and "lora_magnitude_vector" in self.tensors)

    def factors(self) -> tuple[Array, Array]:
        """A [rank, in] and B [out, rank] of a dense layer."""
        if "lora_E" in self.tensors:
            return self.tensor("lora_A") * self.tensor("lora_E"), self.tensor("lora_B")
        return self.tensor("lora_A.weight"), self.tensor("lora_B.weight")

    def weight(self, weight: Array, rows: slice) -> Array:
        """The merged ``rows`` of the weight, of which ``weight`` are the unmerged."""
        magnitude = self.tensor("lora_magnitude_vector") if "lora_magnitude_vector" in self.tensors else None
        if "lora_embedding_A" in self.tensors:
            a, b = self.tensor("lora_embedding_A"), self.tensor("lora_embedding_B")
            return lowrank.merged_weight(weight.T, a[:, rows], b, self.scaling, magnitude).T
        if self.start:
            rng = np.random.default_rng(0)  # nothing is drawn from it
            a, b = lowrank.starting_factors(self.start, weight, self.lora_rank, self.scaling, rng)
            weight = lowrank.merged_weight(weight, a, b, -self.scaling)
        a, b = self.factors()
        return lowrank.merged_weight(weight, a, b[rows], self.scaling, None if magnitude is None else magnitude[rows])

    def blocks(self, base: Entry) -> Iterator[Array]:
        """The merged weight in blocks of rows."""
        if "weight" in self.tensors:
            yield from storage.read_blocks(self.tensors["weight"])
            return
        for rows in storage.row_blocks(base.shape) if self.by_rows else [slice(0, base.shape[0])]:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the caller to refuse
                merged = self.weight(storage.read(storage.rows_of(base, rows.start, rows.stop), np.float32), rows)
            yield merged
        self.read.clear()

    def bias(self, base: Array) -> Array:
        """The merged bias."""
        for factor in ("bias", "base_layer.bias"):
            base = base if factor not in self.tensors else self.tensor(factor)
        if "lora_B.bias" in self.tensors:
            base = base + np.float32(self.scaling) * self.tensor("lora_B.bias")
        return base


def wanted_shapes(name: str, found: Shapes, shape: tuple[int, ...], has_bias: bool, config: LoraConfig) -> Shapes:
    """Names and shapes of the tensors that module ``name``, of a weight of ``shape``, must have to be what the ones
    ``found`` begin to make of it."""
    rows, width = shape[0], shape[-1]
    rank = int(by_pattern(name, config.rank_pattern, config.lora_rank))
    wanted: Shapes
    if "lora_embedding_A" in found or "lora_embedding_B" in found:
        wanted, length, bias = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (width, rank)}, width, False
    elif not any(factor.startswith("lora_") for factor in found):
        wanted = {"weight": shape} if "weight" in found else {}
        return wanted | ({"bias": (rows,)} if has_bias else {})
    elif isinstance(config, AdaLoraConfig):
        kept = config.kept.get(name)
        if kept is not None and found.get("lora_E", (0,))[0] == sum(kept):
            rank = sum(kept)
        wanted, length, bias = {"lora_A": (rank, width), "lora_B": (rows, rank), "lora_E": (rank, 1)}, rows, True
    else:
        wanted, length, bias = {"lora_A.weight": (rank, width), "lora_B.weight": (rows, rank)}, rows, True
        if config.lora_bias:
            wanted["lora_B.bias"] = (rows,)
    if config.use_dora:
        wanted["lora_magnitude_vector"] = (length,)
    if bias and config.bias != "none" and has_bias:
        wanted["base_layer.bias"] = (rows,)
    return wanted


def same_copy(copy: Entry, base: Entry) -> bool:
    """Whether an adapter's copy of a base weight is the model's, but for rounding."""
    blocks = zip(storage.read_blocks(copy), storage.read_blocks(base), strict=False)
    return copy.shape == base.shape and all(np.allclose(x, y, rtol=1e-2, atol=1e-4) for x, y in blocks)


def module_faults(name: str, tensors: Mapping[str, Entry], base: Mapping[str, Entry], config: LoraConfig) -> list[str]:
    """Why the tensors of one module do not fit the module of ``base``; empty where they do."""
    weight, prefix = base[f"{name}.weight"], f"{PREFIX}{name}."
    found = {factor: entry.shape for factor, entry in tensors.items()}
    wanted = wanted_shapes(name, found, weight.shape, f"{name}.bias" in base, config)
    if "base_layer.weight" in tensors:
        wanted["base_layer.weight"] = weight.shape
    faults = [f"{prefix}{factor} is missing" for factor in wanted if factor not in found]
    faults += [f"{prefix}{factor} {found[factor]} has no place" for factor in found if factor not in wanted]
    faults += [
        f"{prefix}{factor} is {found[factor]}, should be {shape}"
        for factor, shape in wanted.items()
        if factor in found and found[factor] != shape
    ]
    if not faults and "base_layer.weight" in tensors and not same_copy(tensors["base_layer.weight"], weight):
        faults.append(f"{prefix}base_layer.weight is another than the model's")
    return faults


def modules_of(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The adapter's tensors by module and factor; those with strange names are left out."""
    modules: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        found = split_key(key)
        if found is not None:
            modules.setdefault(found.name, {})[found.factor] = entry
    return modules


def fit_faults(entries: Mapping[str, Entry], base: Mapping[str, Entry], config: LoraConfig) -> list[str]:
    """Every tensor of the adapter that has no place in ``base`` or another shape than its place."""
    known: dict[str, Key | None] = {key: split_key(key) for key in entries}
    faults = [
        f"{key} {entries[key].shape} has no place in the model"
        for key, found in known.items()
        if found is None or f"{found.name}.weight" not in base
    ]
    for name, tensors in modules_of(entries).items():
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
    modules = modules_of(entries)
    lora = [name for name, tensors in modules.items() if any(factor.startswith("lora_") for factor in tensors)]
    check_patterns(path, config, lora)
    faults = fit_faults(entries, base, config)
    if faults or not lora:
        raise LoraMsError(f"{path}: made for another model: {listed(faults) or 'it holds no LoRA tensor'}")
    bare = [name for name in lora if "lora_B.bias" in modules[name] and f"{name}.bias" not in base]
    if bare:
        raise LoraMsError(
            f"{path}: lora_bias cannot be merged into layers that have no bias: {bare[0]} and {len(bare) - 1} others"
        )
    check_finite(path, entries)
    return {name: update_of(name, tensors, config) for name, tensors in modules.items()}


def update_of(name: str, tensors: Mapping[str, Entry], config: LoraConfig) -> Update:
    """The update of one module by the adapter's settings."""
    rank = int(by_pattern(name, config.rank_pattern, config.lora_rank))
    alpha = by_pattern(name, config.alpha_pattern, config.lora_alpha)
    if isinstance(config, AdaLoraConfig):
        return Update(tensors, rank, alpha / (rank + 1e-5))  # PEFT's own guard
    init = str(config.init_lora_weights)
    start = init if lowrank.takes_out(init) and "lora_A.weight" in tensors else ""
    return Update(tensors, rank, lowrank.scaling_of(rank, alpha, config.use_rslora), start)


def with_head(base: Mapping[str, Entry], tied: bool) -> dict[str, Entry]:
    """``base`` with the head that a tied model does not store, or stores a copy of."""
    shared = base.get(f"{EMBEDDING}.weight")
    return {**base, f"{HEAD}.weight": shared} if tied and shared is not None else dict(base)


def still_tied(updates: Mapping[str, Update]) -> bool:
    """Whether head and embedding, one tensor before, are one after."""
    if HEAD not in updates or EMBEDDING not in updates:
        return HEAD not in updates and EMBEDDING not in updates
    head, embedding = updates[HEAD], updates[EMBEDDING]
    pairs = [("weight", "weight", False), ("lora_A.weight", "lora_embedding_B", True)]
    pairs.append(("lora_B.weight", "lora_embedding_A", True))
    pairs = [pair for pair in pairs if pair[0] in head.tensors]
    if any("lora_magnitude_vector" in update.tensors for update in (head, embedding)) or head.start:
        return False
    if not pairs or any(factor not in embedding.tensors for _, factor, _ in pairs) or head.scaling != embedding.scaling:
        return False
    for ours, theirs, turned in pairs:
        x, y = storage.read(head.tensors[ours], np.float32), storage.read(embedding.tensors[theirs], np.float32)
        if not np.array_equal(x, y.T if turned else y):
            return False
    return True


def plan(base: Mapping[str, Entry], updates: Mapping[str, Update], dtype: str | None, safe: bool) -> dict[str, Planned]:
    """The tensors of the merged model in the order of ``base``.

    dtype: safetensors' name of the type to write; None for each tensor's own.
    safe: blocks that are not finite as they are written raise LoraMsError.
    """
    planned = {}
    for key, entry in base.items():
        if entry.dtype not in storage.DTYPES:
            raise LoraMsError(f"{entry.file}: {key} is of type {entry.dtype}, which is not supported")
        name, _, leaf = key.rpartition(".")
        update, target = updates.get(name), dtype or entry.dtype
        if update is not None and not (update.changes_weight if leaf == "weight" else update.changes_bias):
            update = None
        planned[key] = Planned(target, entry.shape, _blocks(key, entry, update, target, safe))
    return planned


def _blocks(key: str, entry: Entry, update: Update | None, dtype: str, safe: bool):
    def stored() -> Iterator[NDArray]:
        # what stays as it is is copied word by word
        yield from storage.read_words(entry)

    def computed() -> Iterator[NDArray]:
        if update is None:
            values = storage.read_blocks(entry)
        elif key.endswith(".bias"):
            values = iter([update.bias(storage.read(entry, np.float32))])
        else:
            values = update.blocks(entry)
        for block in values:
            words = storage.encoded(block, dtype)
            if safe and not np.isfinite(block).all():
                raise LoraMsError(f"the merged {key} holds NaN or infinity; nothing was written")
            if safe and dtype == "F16" and not np.isfinite(words).all():
                raise LoraMsError(f"{key} is out of float16's range: merge with --dtype bfloat16 or float32")
            yield words

    return stored if update is None and dtype == entry.dtype else computed
