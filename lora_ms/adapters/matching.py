"""Which modules get an adapter, and of what rank and alpha: decided from names alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from lora_ms.adapters.config import LayerGroup, LoraConfig
from lora_ms.errors import LoraMsError

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "output")  # never among all-linear
EMBEDDINGS = ("embed_tokens", "tok_embeddings")

# MindFormers' leaf names of the projections, accepted in target_modules
ALIASES = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "qkv_proj": "w_qkv",  # where MindFormers keeps q, k and v as one matrix, and gate and up
    "gate_up_proj": "w_gate_hidden",
}


class Place(NamedTuple):
    """Rank and alpha of the adapter on one module."""

    lora_rank: int
    lora_alpha: float


def leaf_of(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the dotted path ``name`` ends with one of ``suffixes``, as PEFT matches lists."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the layer at path ``name`` is a target (rules: ``LoraConfig.target_modules``)."""
    leaf = leaf_of(name)
    if target_modules == ALL_LINEAR:
        return leaf not in (*HEADS, *EMBEDDINGS)
    if isinstance(target_modules, str):
        leaf_names = (leaf, ALIASES.get(leaf, leaf))
        return any(re.match(target_modules, n) for n in leaf_names) or bool(re.fullmatch(target_modules, name))
    return ends_with(name, target_modules)


def layer_index(name: str, layers_pattern: Collection[str] = ()) -> int | None:
    """The number of the layer that ``name`` lies in, counted in the list that ``layers_pattern`` names."""
    for pattern in layers_pattern or (r"[^.]*",):
        found = re.match(rf".*?\.{pattern}\.(\d+)\.", "." + name)
        if found:
            return int(found[1])
    return None


def by_pattern(name: str, patterns: Mapping[str, float], default: float) -> float:
    """The value of the first pattern that fits the end of the path, as PEFT reads its two patterns."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def groups_of(name: str, config: LoraConfig) -> list[LayerGroup]:
    """The layer groups that want the module ``name``; one at most, where they do not overlap."""
    index, found = layer_index(name, config.layers_pattern), []
    for group in config.layer_groups:
        targets = config.target_modules if group.target_modules is None else group.target_modules
        if index in group.layers and matches(name, targets):
            found.append(group)
    return found


def place_of(name: str, config: LoraConfig) -> Place | None:
    """Rank and alpha that ``config`` gives the module ``name``; None where it gets no adapter."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and excluded and re.fullmatch(excluded, name):
        return None
    if not isinstance(excluded, str) and ends_with(name, excluded):
        return None
    if any(part in name for part in config.exclude_layers) or ends_with(name, config.modules_to_save):
        return None
    index = layer_index(name, config.layers_pattern)
    if config.layer_groups:
        group = next(iter(groups_of(name, config)), None)
        return None if group is None else Place(group.lora_rank, group.lora_alpha)
    if not config.target_modules or not matches(name, config.target_modules):
        return None
    if config.layers_to_transform is not None and index not in config.layers_to_transform:
        return None
    return Place(
        int(by_pattern(name, config.rank_pattern, config.lora_rank)),
        by_pattern(name, config.alpha_pattern, config.lora_alpha),
    )


def places(names: Iterable[str], config: LoraConfig) -> dict[str, Place]:
    """The modules among ``names`` (dotted paths) that get adapters.

    Raises:
        LoraMsError: an expression that does not parse, a pattern that matches nothing, overlapping layer groups, or no
            match at all; what could match is listed.
    """
    names = list(names)
    try:
        found = {name: place for name in names if (place := place_of(name, config)) is not None}
        check_groups(config, names)
    except re.error as error:
        raise LoraMsError(f"not a regular expression in pet_config: {error.pattern!r}: {error}") from None
    if not found:
        leaves = sorted({leaf_of(name) for name in names})
        modules = config.exclude_modules
        excluded = [*config.exclude_layers, *((modules,) if modules and isinstance(modules, str) else modules)]
        outside = f" outside {', '.join(excluded)}" if excluded else ""
        if config.layers_to_transform is not None:
            outside += f" in layers {list(config.layers_to_transform)}"
        targets = config.target_modules
        asked = repr(targets) if isinstance(targets, str) else ", ".join(targets)
        raise LoraMsError(
            f"target_modules {asked} matches no layer{outside}; could match: {', '.join(leaves)}, or {ALL_LINEAR}"
        )
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in found):
                raise LoraMsError(f"{key} {pattern!r} matches none of the {len(found)} adapted modules")
    return found


def check_groups(config: LoraConfig, names: Iterable[str]) -> None:
    """Raises LoraMsError where two layer groups want one module, or a group's layer is not there."""
    names = list(names)
    layers = {index for name in names if (index := layer_index(name)) is not None}
    beyond = sorted({layer for group in config.layer_groups for layer in group.layers} - layers)
    if beyond:
        raise LoraMsError(f"layer_groups: layers {ranges(beyond)} are not there: the model has {ranges(layers)}")
    twice = {layer_index(name) or 0 for name in names if len(groups_of(name, config)) > 1}
    if twice:
        raise LoraMsError(f"layer_groups overlap in layers {ranges(twice)}: give each module once")


def gaps(config: LoraConfig, names: Iterable[str]) -> list[int]:
    """Layers that no layer group holds."""
    if not config.layer_groups:
        return []
    layers = {index for name in names if (index := layer_index(name)) is not None}
    return sorted(layers - {layer for group in config.layer_groups for layer in group.layers})


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
