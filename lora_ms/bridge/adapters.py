"""LoRA checkpoints of MindFormers and MindPet, and adapters in PEFT's format: names and layouts, no arithmetic."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_ms.adapters import peft_files
from lora_ms.adapters.matching import layer_index
from lora_ms.adapters.methods.lora import DENSE_PAIR, LoraConfig, LoraSpec
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_files import by_module
from lora_ms.bridge.files import Stored, of_entry, planned
from lora_ms.bridge.layout import Heads, inverse
from lora_ms.errors import LoraMsError
from lora_ms.models.mindformers_names import FUSED, mindformers_module, split_name
from lora_ms.storage import Planned
from lora_ms.text import listed

# naming -> (which cells' names, what stands for A and for B)
NAMINGS = {
    "mindpet": ("legacy", "mindpet_delta_lora_{}"),  # MindFormers 1.x, its Llama cells: lower case
    "mcore": ("mcore", "lora_{}.weight"),  # MindFormers 1.6 on, its mcore cells: upper case
    "v2": ("mcore", "lora_{}"),  # MindFormers 2.0: lower case
}
OPTIMISER = ("adam_", "accu_grads", "moment", "moments.")  # states that a full checkpoint holds beside
FACTOR = re.compile(r"(?:mindpet_delta_|tk_delta_)?lora_([ab])(?:\.weight)?", re.IGNORECASE)


class Factors(NamedTuple):
    """A [rank, in] and B [out, rank] of one module, and the rows of B that are its own (None: all, as they stand)."""

    a: Stored
    b: Stored
    rows: np.ndarray | None = None


def read_factors(tensors: Mapping[str, Stored], heads: Heads | None, where: Path) -> dict[str, Factors]:
    """The adapter in ``tensors`` by Hugging Face's module paths, fused modules split; other tensors are left out.

    heads: of the model; needed where q, k and v are one matrix.

    Raises:
        LoraMsError: no adapter, half of one, an unknown module, or a fused one that cannot be split.
    """
    found: dict[str, dict[str, Stored]] = {}
    unknown = []
    for name, tensor in tensors.items():
        split = split_name(name)
        factor = None if split is None else FACTOR.fullmatch(split.rest)
        if split is None or factor is None:
            unknown += [name] if "lora_" in name.lower() and not name.startswith(OPTIMISER) else []
            continue
        found.setdefault(split.module, {})[factor[1].lower()] = tensor
    if unknown:
        raise LoraMsError(f"{where}: {len(unknown)} LoRA tensors of unknown modules, such as {unknown[0]}")
    if not found:
        raise LoraMsError(f"{where}: holds no LoRA tensor")
    halves = [name for name, parts in found.items() if len(parts) < 2]
    if halves:
        raise LoraMsError(f"{where}: only one of A and B is there for: {', '.join(halves[:3])}")
    factors: dict[str, Factors] = {}
    for module, parts in found.items():
        a, b = parts["a"], parts["b"]
        if a.words.ndim != 2 or b.words.ndim != 2 or len(a.words) != b.words.shape[1]:
            raise LoraMsError(f"{where}: {module}: A {a.words.shape} and B {b.words.shape} are no pair")
        factors |= split_fused(module, a, b, heads, where)
    return factors


def split_fused(module: str, a: Stored, b: Stored, heads: Heads | None, where: Path) -> dict[str, Factors]:
    """The modules that ``module`` stands for; itself where it is none of the fused ones."""
    prefix, inside = module_parts(module)
    if inside not in FUSED:
        return {module: Factors(a, b)}
    if heads is None:
        raise LoraMsError(
            f"{where}: {module} is several matrices in one: give --load_checkpoint, the model's Hugging Face folder"
        )
    rows = len(b.words)
    back, factors, start = inverse(heads.order(module, rows)), {}, 0
    for part, height in zip(FUSED[inside], heads.heights(module, rows), strict=True):
        factors[prefix + part] = Factors(a, b, back[start : start + height])
        start += height
    return factors


def module_parts(module: str) -> tuple[str, str]:
    """``model.layers.3.`` and ``mlp.down_proj``; nothing and the whole outside layers."""
    found = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", module)
    return (found[1], found[2]) if found else ("", module)


def peft_tensors(factors: Mapping[str, Factors]) -> dict[str, Planned]:
    """The tensors of ``adapter_model.safetensors``."""
    tensors = {}
    for module, (a, b, rows) in factors.items():
        tensors[f"{peft_files.PREFIX}{module}.lora_A.weight"] = planned([a])
        tensors[f"{peft_files.PREFIX}{module}.lora_B.weight"] = planned([b], order=rows)
    return tensors


def peft_config(factors: Mapping[str, Factors], lora_alpha: float, base: str | None) -> dict:
    """``adapter_config.json``."""
    specs = {module: LoraSpec(len(f.a.words), lora_alpha) for module, f in factors.items()}
    layers = range(1 + max((layer_index(module) or 0 for module in specs), default=0))
    inside = {module_parts(module)[1] for module in specs if layer_index(module) is not None}
    everywhere = [f"model.layers.{layer}.{name}" for layer in layers for name in sorted(inside)]
    plain = tuple(name for name in everywhere if name not in specs)
    rank = next(iter(specs.values())).lora_rank
    return to_peft(LoraConfig(rank, lora_alpha), Adapted(specs, (), plain), base)


def read_peft(path: Path) -> tuple[dict[str, Factors], LoraSpec]:
    """The adapter in PEFT directory ``path``, where MindFormers can hold it, and the one rank and alpha that
    ``pet_config`` then has for it.

    Raises:
        LoraMsError: it is more than plain LoRA on dense layers, of one rank and alpha; all reasons are listed.
    """
    config, modules = peft_files.read_adapter_config(path), by_module(peft_files.read_entries(path))
    faults = [f"it is {config.title}"] if config.title != LoraConfig().title else []
    faults += [f"it starts from {config.changed_base}"] if config.changed_base else []
    factors, specs = {}, set()
    for module, tensors in modules.items():
        if set(tensors) != {*DENSE_PAIR}:
            faults.append(f"{module} holds {', '.join(sorted(tensors))}")
            continue
        a, b = (of_entry(tensors[name]) for name in DENSE_PAIR)
        factors[module] = Factors(a, b)
        specs.add(config.plain_spec(module))
    if len(specs) > 1:
        faults.append("its modules differ in rank or alpha: " + ", ".join(f"{r} and {a:g}" for r, a in sorted(specs)))
    if faults or not factors:
        raise LoraMsError(f"{path}: MindFormers has no place for it: {listed(faults) or 'it holds no LoRA tensor'}")
    return factors, specs.pop()


def mindformers_tensors(
    factors: Mapping[str, Factors], naming: str, fuse: bool, heads: Heads | None, where: Path
) -> dict[str, Planned]:
    """The tensors of a MindFormers checkpoint.

    fuse: q, k and v as one matrix, and gate and up as one.

    Raises:
        LoraMsError: a module that MindFormers does not know, or parts of a fused one that share no A.
    """
    style, ending = NAMINGS[naming]
    endings = [ending.format(letter if naming == "mcore" else letter.lower()) for letter in "AB"]
    rest, tensors = dict(factors), dict[str, Planned]()
    for prefix in dict.fromkeys(module_parts(module)[0] for module in factors) if fuse else ():
        for whole, parts in FUSED.items():
            there = [prefix + part for part in parts if prefix + part in rest]
            if there:
                name = f"{mindformers_module(prefix + whole, style)}."
                pairs = _fused(prefix + whole, [prefix + part for part in parts], rest, heads, where)
                tensors |= {name + end: tensor for end, tensor in zip(endings, pairs, strict=True)}
                rest = {module: value for module, value in rest.items() if module not in there}
    for module, (a, b, rows) in rest.items():
        theirs = mindformers_module(module, style)
        if theirs is None:
            raise LoraMsError(f"{where}: MindFormers has no module for {module}")
        pairs = (planned([a]), planned([b], order=rows))
        tensors |= {f"{theirs}.{end}": tensor for end, tensor in zip(endings, pairs, strict=True)}
    return tensors


def _fused(
    whole: str, parts: list[str], factors: Mapping[str, Factors], heads: Heads | None, where: Path
) -> tuple[Planned, Planned]:
    missing = [part for part in parts if part not in factors]
    if missing:
        raise LoraMsError(f"{where}: cannot be fused: {', '.join(missing)} has no adapter; convert with --concat False")
    first = factors[parts[0]]
    if any(not np.array_equal(first.a.words, factors[part].a.words) for part in parts[1:]):
        raise LoraMsError(
            f"{where}: cannot be fused: {', '.join(part.rpartition('.')[2] for part in parts)} of "
            f"{whole.rpartition('.')[0]} have an A each, one matrix has one; convert with --concat False"
        )
    if heads is None:
        raise LoraMsError(f"{where}: to fuse {whole}, give --load_checkpoint, the model's Hugging Face folder")
    sources = [factors[part].b for part in parts]
    order = heads.order(whole, sum(len(source.words) for source in sources))
    return planned([first.a]), planned(sources, order=order)
