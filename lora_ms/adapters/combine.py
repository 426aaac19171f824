"""Several adapters made into one: names and arithmetic of PEFT's ``add_weighted_adapter``, without MindSpore."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_ms import storage
from lora_ms.adapters import lowrank
from lora_ms.adapters.arithmetic import Array, Factors, Mix, combined_pair, widened
from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.matching import EMBEDDINGS, Place, by_pattern, leaf_of
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
from lora_ms.errors import LoraMsError, listed

DENSE_NAMES = ("lora_A.weight", "lora_B.weight")
EMBEDDING_NAMES = ("lora_embedding_A", "lora_embedding_B")
MAJORITIES = ("total", "frequency")

METHODS = {
    "linear": "weighted sum of the A and of the B: quick and rough; equal ranks",
    "cat": "A and B side by side: exactly the weighted sum of the updates; the ranks add up",
    "svd": "the weighted sum of the updates, as near as --rank comes to it",
    "ties": "linear, of the largest values, where their signs are those of the majority",
    "ties_svd": "ties of the updates themselves, as near as --rank comes to it",
    "dare_linear": "linear, of values kept at random and scaled up",
    "dare_ties": "linear, of values kept at random, where their signs are those of the majority",
    "dare_linear_svd": "dare_linear of the updates themselves, as near as --rank comes to it",
    "dare_ties_svd": "dare_ties of the updates themselves, as near as --rank comes to it",
    "magnitude_prune": "linear, of the largest values",
    "magnitude_prune_svd": "magnitude_prune of the updates themselves, as near as --rank comes to it",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: its settings, and A, B and scaling by the path of the module.

    Raises:
        LoraMsError: the settings ask for more than LoRA, which no sum of A and B can hold.
    """

    config: LoraConfig
    tensors: Mapping[str, Factors]

    def __post_init__(self):
        config = self.config
        found = {
            "DoRA": config.use_dora,
            "AdaLoRA": isinstance(config, AdaLoraConfig),
            "lora_bias": config.lora_bias,
            f"bias: {config.bias}": config.bias != "none",
            f"modules_to_save: {', '.join(config.modules_to_save)}": config.modules_to_save,
        }
        extra = [name for name, present in found.items() if present]
        if extra:
            raise LoraMsError(f"an adapter with {'; '.join(extra)} cannot be combined: LoRA and rsLoRA alone can")


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
        method: one of ``METHODS``.
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
    largest = max(len(a) for adapter in adapters for a, _, _ in adapter.tensors.values())
    mix = Mix(method.removesuffix("_svd"), density or 1.0, np.random.default_rng(rng), majority_sign_method)
    pairs = {}
    for name in names:
        there = [i for i, adapter in enumerate(adapters) if name in adapter.tensors]
        parts, shares = [adapters[i].tensors[name] for i in there], [weights[i] for i in there]
        pairs[name] = combined_pair(parts, shares, method, rank or largest, mix)
    new_rank = rank or max(len(a) for a, _ in pairs.values())
    tensors = {name: (*widened(*pair, new_rank), 1.0) for name, pair in pairs.items()}
    targets = names if any(not by_leaf(adapter.config) for adapter in adapters) else {leaf_of(name) for name in names}
    config = LoraConfig(new_rank, float(new_rank), adapters[0].config.lora_dropout, tuple(sorted(targets)))
    return Adapter(config, tensors)


def check_arguments(count: int, weights: Sequence[float], method: str, density: float | None, rank: int | None) -> None:
    """Raises LoraMsError for what is wrong whatever the ``count`` adapters hold."""
    if method not in METHODS:
        raise LoraMsError(f"method {method!r} is none of {', '.join(METHODS)}")
    if not count or count != len(weights):
        raise LoraMsError(f"{count} adapters and {len(weights)} weights: give one weight for each adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise LoraMsError(f"weights must be finite, got {', '.join(map(str, weights))}")
    wants_density = method not in ("linear", "cat", "svd")
    if wants_density and density is None:
        raise LoraMsError(f"method {method} needs density: the share of values to keep, such as 0.5")
    if density is not None and not wants_density:
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


def by_leaf(config: LoraConfig) -> bool:
    """Whether leaf names say which modules ``config`` chooses, as far as its tensors exist."""
    targets, narrowed = config.target_modules, config.layers_to_transform is not None or config.layer_groups
    listed = not isinstance(targets, str) and not any("." in target for target in targets)
    return listed and not (narrowed or config.exclude_modules or config.exclude_layers)


def factor_names(name: str) -> tuple[str, str]:
    """What PEFT calls A and B of the module at path ``name``."""
    return EMBEDDING_NAMES if leaf_of(name) in EMBEDDINGS else DENSE_NAMES


def read_adapter(path: str | os.PathLike) -> Adapter:
    """The adapter of directory ``path``, float32.

    Raises:
        LoraMsError: no adapter, a kind that cannot be combined, or tensors that do not fit its settings; all of these
            are listed.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if lowrank.takes_out(str(config.init_lora_weights)):
        raise LoraMsError(
            f"{path}: init_lora_weights {config.init_lora_weights} changed the base weights, on which no other adapter "
            "stands: save it converted to LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    try:
        Adapter(config, {})
    except LoraMsError as error:
        raise LoraMsError(f"{path}: {error}") from None
    stored = {key: storage.read(entry, np.float32) for key, entry in read_entries(path).items()}
    halves: dict[str, dict[str, Array]] = {}
    faults = [f"{key} holds NaN or infinity" for key, value in stored.items() if not np.isfinite(value).all()]
    for key, value in stored.items():
        found = split_key(key)
        if found is not None and found.factor in factor_names(found.name):
            halves.setdefault(found.name, {})[found.factor] = value
        elif found is None or found.factor != "base_layer.weight":  # PEFT's copy of the embedding
            faults.append(f"{key} is no factor of LoRA")
    check_patterns(path, config, list(halves))
    tensors = {}
    for name, pair in halves.items():
        a, b = (pair.get(half) for half in factor_names(name))
        rank = int(by_pattern(name, config.rank_pattern, config.lora_rank))
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
            shapes = {half: value.shape for half, value in pair.items()}
            faults.append(f"{name} has {shapes}, should have A and B of rank {rank}")
            continue
        alpha = by_pattern(name, config.alpha_pattern, config.lora_alpha)
        tensors[name] = (a, b, lowrank.scaling_of(rank, alpha, config.use_rslora))
    if faults or not tensors:
        raise LoraMsError(f"{path}: cannot be combined: {listed(faults) or 'it holds no LoRA tensor'}")
    return Adapter(config, tensors)


def write_adapter(adapter: Adapter, path: str | os.PathLike, base_model: str | None = None) -> None:
    """Writes the adapter into directory ``path`` in PEFT's format, each file whole or not at all.

    Raises:
        LoraMsError: a factor is not finite (nothing is written then), or the directory cannot be written.
    """
    path, config, stored, places = Path(path), adapter.config, {}, {}
    for name, (a, b, scaling) in adapter.tensors.items():
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise LoraMsError(f"{name} holds NaN or infinity; {path} was not written")
        rank = len(a)
        for half, value in zip(factor_names(name), (a, b), strict=True):
            stored[f"{PREFIX}{name}.{half}"] = np.ascontiguousarray(value, np.float32)
        places[name] = Place(rank, round(scaling / lowrank.scaling_of(rank, 1.0, config.use_rslora), 9))
    # whole paths are written where a leaf name would take in modules that have no tensors
    plain = () if by_leaf(config) else tuple(places)
    storage.write_tensors(path / WEIGHTS, stored)
    storage.write_json(path / CONFIG, to_peft(config, Adapted(places, plain=plain), base_model))
