"""How options name modules: by leaf names, path suffixes, regular expressions and indices of layers."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lora_ms.errors import LoraMsError
from lora_ms.limits import fullmatch, match

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "output")  # never among all-linear
EMBEDDINGS = ("embed_tokens", "tok_embeddings")
FIRST_NUMBER = re.compile(r"\.(?P<layer>\d{1,9})\.")  # of a dotted path

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
        # a look ahead or behind at a path: the bare name would pass by what it forbids
        looks_around = re.search(r"\(\?<?[!=]", target_modules) and re.search(r"\\\.|\.\*", target_modules)
        leaf_names = () if looks_around else (leaf, ALIASES.get(leaf, leaf))
        return any(match(target_modules, n) for n in leaf_names) or bool(fullmatch(target_modules, name))
    return ends_with(name, target_modules)


def check_listed(
    key: str, listed: str | Iterable[str], names: Sequence[str], fits: Callable[[str, str], bool] | None = None
) -> None:
    """Raises LoraMsError where a list names what is none of the modules ``names``; an expression may match nothing.

    Args:
        key: the option that the list is of.
        fits: whether a module's path is one that an entry names; None: by its end, as ``ends_with``.
    """
    if isinstance(listed, str):
        return
    fits = fits or (lambda name, entry: ends_with(name, (entry,)))
    unknown = [entry for entry in listed if not any(fits(name, entry) for name in names)]
    if unknown:
        hint = nearest_modules(unknown, names)
        hint += f", or {ALL_LINEAR}" if key == "target_modules" and hint.startswith("could") else ""
        raise LoraMsError(f"{key} {', '.join(unknown)}: the model has no such module; {hint}")


def nearest_modules(unknown: Sequence[str], names: Iterable[str]) -> str:
    """What to write in place of names that no module has: for each the nearest that one of ``names`` has, or all there
    are where one has none of its own."""
    paths = [name.split(".") for name in names]
    near: list[str] = []
    for entry in unknown:
        ends = dict.fromkeys(".".join(path[-1 - entry.count(".") :]) for path in paths)
        renamed = [leaf for leaf in ends if ALIASES.get(leaf) == entry]
        found = renamed or difflib.get_close_matches(entry, ends, 2)
        if len(found) == 1 or "." in entry or len({_likeness(entry, end) for end in found}) > 1:
            near += found[:1]
    if len({*near}) == len(unknown):
        return f"the nearest: {', '.join(near)}"
    return f"could match: {', '.join(sorted({path[-1] for path in paths}))}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()


def layer_index(name: str, layers_pattern: Collection[str] = ()) -> int | None:
    """The number of the layer that ``name`` lies in, counted in the list that ``layers_pattern`` names."""
    if not layers_pattern:
        first = FIRST_NUMBER.search(name)
        return int(first["layer"]) if first else None
    for pattern in layers_pattern:
        found = match(rf".*?\.(?:{pattern})\.(?P<layer>\d{{1,9}})\.", "." + name, shown=pattern)
        if found:
            return int(found["layer"])
    return None


def fits_end(name: str, pattern: str) -> bool:
    """Whether an expression fits the whole path, or its end from a dot on."""
    return match(rf"(.*\.)?({pattern})$", name, shown=pattern) is not None


def by_pattern(name: str, patterns: Mapping[str, float], default: float) -> float:
    """The value of the first pattern that fits the end of the path, as PEFT reads its two patterns."""
    for pattern, value in patterns.items():
        if fits_end(name, pattern):
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
