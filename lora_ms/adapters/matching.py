"""How options name modules: by leaf names, path suffixes, regular expressions and indices of layers."""

import re
from collections.abc import Collection, Iterable, Mapping

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


def leaf_of(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the dotted path ``name`` ends with one of ``suffixes``, as PEFT matches lists."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the layer at path ``name`` is a target (rules: ``AdapterConfig.target_modules``)."""
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


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
