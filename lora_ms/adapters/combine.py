"""Several adapters made into one: names and arithmetic of PEFT's ``add_weighted_adapter``, without MindSpore."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lora_ms import saving, storage
from lora_ms.adapters.arithmetic import Array, Mix, combined_pair, widened
from lora_ms.adapters.matching import leaf_of
from lora_ms.adapters.methods.base import AdapterConfig, Pair, RowUpdate
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    check_patterns,
    read_adapter_config,
    read_entries,
    split_key,
)
from lora_ms.errors import LoraMsError
from lora_ms.text import listed

Part = TypeVar("Part")
BIASES = ("base_layer.bias", "bias")  # of a layer with an adapter, and of one without
MAJORITIES = ("total", "frequency")

COMBINATIONS = {
    "linear": "weighted sum of the A and of the B: quick and rough; equal ranks",
    "cat": "A and B side by side: exactly the weighted sum of the updates; the ranks add up",
    "svd": "the weighted sum of the updates, as near as --rank allows",
    "ties": "linear, of the largest values, where their signs are those of the majority",
    "ties_svd": "ties of the updates themselves, as near as --rank allows",
    "dare_linear": "linear, of values kept at random and scaled up",
    "dare_ties": "linear, of values kept at random, where their signs are those of the majority",
    "dare_linear_svd": "dare_linear of the updates themselves, as near as --rank allows",
    "dare_ties_svd": "dare_ties of the updates themselves, as near as --rank allows",
    "magnitude_prune": "linear, of the largest values",
    "magnitude_prune_svd": "magnitude_prune of the updates themselves, as near as --rank allows",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: its settings, and A, B and scaling by the path of the module.

    Raises:
        LoraMsError: the settings ask for more than LoRA, which no sum of A and B can hold.
    """

    config: AdapterConfig
    tensors: Mapping[str, Pair]

    def __post_init__(self):
        extra = self.config.not_a_pair()
        if extra:
            raise LoraMsError(f"an adapter with {'; '.join(extra)} cannot be combined: only LoRA and rsLoRA can")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    density: float | None = None,
    rank: int | None = None,
    rng: np.random.Generator | int | None = None,
    majority_sign_method: str = "total",
) -> Adapter:
    """One adapter of all, of scaling 1 and of one rank: where a module needs less, A and B end in zeros.

    A module that an adapter leaves out counts as an update of zero. PEFT takes any method as ``linear`` where there is
    one adapter only; here the method is the one asked for, so that ``svd`` can lower a rank.

    Args:
        weights: of the updates, one for each adapter, of either sign.
        method: one of ``COMBINATIONS``.
        density: share of the values to keep, above 0 and at most 1; for ties, dare and magnitude_prune.
        rank: of the result of an svd method; the adapters' largest without it.
        rng: or a seed, for dare; another result each time without it.
        majority_sign_method: the sign of the sum of the values (total), or of most of them (frequency); for ties.

    Raises:
        LoraMsError: an argument that is wrong, missing, or means nothing to ``method``; adapters of different models,
            or of ranks that ``method`` cannot combine.
    """
    check_arguments(len(adapters), weights, method, density, rank)
    if majority_sign_method not in MAJORITIES:
        raise LoraMsError(f"majority_sign_method {majority_sign_method!r} is none of {', '.join(MAJORITIES)}")
    names = sorted({name for adapter in adapters for name in adapter.tensors})
    if not names:
        raise LoraMsError("nothing to combine: the adapters are empty")
    check_shapes(adapters, names, method)
    largest = max(len(pair.a) for adapter in adapters for pair in adapter.tensors.values())
    mix = Mix(method.removesuffix("_svd"), density or 1.0, np.random.default_rng(rng), majority_sign_method)
    pairs = {}
    for name in names:
        there = [i for i, adapter in enumerate(adapters) if name in adapter.tensors]
        parts, shares = [adapters[i].tensors[name] for i in there], [weights[i] for i in there]
        pairs[name] = combined_pair(parts, shares, method, rank or largest, mix)
    new_rank = rank or max(len(a) for a, _ in pairs.values())
    tensors = {name: Pair(*widened(a, b, new_rank), 1.0) for name, (a, b) in pairs.items()}
    by_leaf = all(adapter.config.selects_by_leaf for adapter in adapters)
    targets = {leaf_of(name) for name in names} if by_leaf else names
    return Adapter(adapters[0].config.combined(new_rank, tuple(sorted(targets))), tensors)


def check_arguments(count: int, weights: Sequence[float], method: str, density: float | None, rank: int | None) -> None:
    """Raises LoraMsError for what is wrong whatever the ``count`` adapters hold."""
    if method not in COMBINATIONS:
        raise LoraMsError(f"method {method!r} is none of {', '.join(COMBINATIONS)}")
    if not count or count != len(weights):
        raise LoraMsError(f"{count} adapters and {len(weights)} weights: give one weight for each adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise LoraMsError(f"weights must be finite, got {', '.join(map(str, weights))}")
    needs_density = method not in ("linear", "cat", "svd")
    if needs_density and density is None:
        raise LoraMsError(f"method {method} needs density: the share of values to keep, such as 0.5")
    if density is not None and not needs_density:
        raise LoraMsError(f"density {density} means nothing to method {method}: leave it out")
    if density is not None and not 0 < density <= 1:
        raise LoraMsError(f"density must be above 0 and at most 1, got {density}")
    if rank is not None and not method.endswith("svd"):
        svd = "svd" if method in ("linear", "cat") else f"{method}_svd"
        raise LoraMsError(f"method {method} cannot choose a rank: leave rank {rank} out, or use {svd}")
    if rank is not None and rank < 1:
        raise LoraMsError(f"rank must be at least 1, got {rank}")


def check_shapes(adapters: Sequence[Adapter], names: Iterable[str], method: str) -> None:
    """Raises LoraMsError where adapters stand on other models, or differ in rank where ``method`` forbids it."""
    equal_ranks = method != "cat" and not method.endswith("svd")
    for name in names:
        there = [(i, adapter.tensors[name]) for i, adapter in enumerate(adapters, 1) if name in adapter.tensors]
        first, (a, b, _) = there[0]
        for index, (other_a, other_b, _) in there[1:]:
            sizes, other_sizes = [len(b), a.shape[1]], [len(other_b), other_a.shape[1]]
            if sizes != other_sizes:
                raise LoraMsError(
                    f"the adapters are made for different models: {name} is {sizes} in adapter {first} "
                    f"and {other_sizes} in adapter {index}"
                )
            if equal_ranks and len(a) != len(other_a):
                raise LoraMsError(
                    f"method {method} needs equal ranks: {name} has {len(a)} in adapter {first} and {len(other_a)} in "
                    f"adapter {index}; use {'cat or svd' if method == 'linear' else f'{method}_svd'}"
                )


def read_adapter(path: str | os.PathLike) -> Adapter:
    """The adapter of directory ``path``, float32.

    Raises:
        LoraMsError: no adapter, a kind that cannot be combined, or tensors that do not fit its settings; all of these
            are listed.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if config.changed_base:
        raise LoraMsError(
            f"{path}: {config.changed_base} changed the base weights, and other adapters "
            "need the original ones: save it converted to LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    try:
        Adapter(config, {})
    except LoraMsError as error:
        raise LoraMsError(f"{path}: {error}") from None
    return Adapter(config, _of_modules(path, config, config.pair, config.TENSORS, "combined"))


def read_rows(path: str | os.PathLike) -> dict[str, RowUpdate]:
    """What the adapter of directory ``path`` makes of each layer, by path, in the rows of a batch that use it.

    Raises:
        LoraMsError: no adapter, a kind that cannot run beside others, or tensors that do not fit its settings.
    """
    path = Path(path)
    config = read_adapter_config(path)
    extra = config.not_in_rows()
    if config.changed_base:
        extra.append(f"{config.changed_base}, which changed the base weights")
    if extra:
        raise LoraMsError(
            f"{path}: an adapter with {'; '.join(extra)} cannot run beside others: LoRA, rsLoRA, DoRA and biases can"
        )
    return _of_modules(path, config, config.row_update, (*config.TENSORS, *BIASES), "used")


def _of_modules(
    path: Path,
    config: AdapterConfig,
    take: Callable[[str, Mapping[str, Array]], Part],
    names: Sequence[str],
    deed: str,
) -> dict[str, Part]:
    """What ``take`` makes of each module's tensors, float32.

    names: of the tensors that there may be. deed: what is not done with others, for the error.
    """
    stored = {key: storage.read(entry, np.float32) for key, entry in read_entries(path).items()}
    modules: dict[str, dict[str, Array]] = {}
    faults = [f"{key} holds NaN or infinity" for key, value in stored.items() if not np.isfinite(value).all()]
    for key, value in stored.items():
        found = split_key(key)
        if found is not None and found.tensor in names:
            modules.setdefault(found.module, {})[found.tensor] = value
        elif found is None or found.tensor != "base_layer.weight":  # PEFT's copy of the embedding
            faults.append(f"{key} is no factor of LoRA")
    check_patterns(path, config, list(modules))
    parts = {}
    for name, values in modules.items():
        try:
            parts[name] = take(name, values)
        except LoraMsError as error:
            faults.append(str(error))
    if faults or not parts:
        what = listed(faults) or f"it holds no {config.title} tensor"
        raise LoraMsError(f"{path}: cannot be {deed}: {what}")
    return parts


def write_adapter(adapter: Adapter, path: str | os.PathLike, base_model: str | None = None) -> None:
    """Writes the adapter into directory ``path`` in PEFT's format, each file atomically.

    Raises:
        LoraMsError: a factor is not finite (nothing is written then), or the directory cannot be written.
    """
    path, config = Path(path), adapter.config
    stored: dict[str, Array] = {}
    specs = {}
    for name, pair in adapter.tensors.items():
        if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all()):
            raise LoraMsError(f"{name} holds NaN or infinity; {saving.final_of(path)} was not written")
        for tensor, value in config.pair_tensors(name, pair).items():
            stored[f"{PREFIX}{name}.{tensor}"] = np.ascontiguousarray(value, np.float32)
        specs[name] = config.pair_spec(pair)
    # whole paths are written where a leaf name would choose modules that have no tensors
    plain = () if config.selects_by_leaf else tuple(specs)
    storage.write_tensors(path / WEIGHTS, stored)
    storage.write_json(path / CONFIG, to_peft(config, Adapted(specs, plain=plain), base_model))
