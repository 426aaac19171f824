"""Swaps ``LoRADense`` in for the dense layers that ``target_modules`` names, and freezes the rest."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mindspore import nn

from lora_ms.adapters.config import ALIASES, LoraConfig
from lora_ms.errors import LoraMsError
from lora_ms.nn.lora import LoRADense

HEADS = ("lm_head", "output")  # never among all-linear
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class InjectReport:
    """What was swapped, and how many numbers train."""

    modules: tuple[str, ...]
    trainable: int
    total: int

    def line(self) -> str:
        """One line for the user."""
        share = 100 * self.trainable / self.total
        what = f"LoRA on {len(self.modules)} modules" if self.modules else "no adapter"
        return f"{what}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f}%)"


def dense_layers(model: nn.Cell) -> dict[str, nn.Dense]:
    """Every plain dense layer by dotted path."""
    return {name: cell for name, cell in model.cells_and_names() if type(cell) is nn.Dense}


def matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether the dense layer at path ``name`` is a target (rules: ``LoraConfig.target_modules``)."""
    leaf = name.rsplit(".", 1)[-1]
    if target_modules == ALL_LINEAR:
        return leaf not in HEADS
    if isinstance(target_modules, str):
        leaf_names = (leaf, ALIASES.get(leaf, leaf))
        return any(re.match(target_modules, n) for n in leaf_names) or bool(re.fullmatch(target_modules, name))
    return any(name == target or name.endswith("." + target) for target in target_modules)


def select(model: nn.Cell, config: LoraConfig) -> list[str]:
    """Paths of the dense layers that ``config`` asks for.

    Raises:
        LoraMsError: an expression that does not parse, or no match; what could match is listed.
    """
    layers = dense_layers(model)
    try:
        names = [name for name in layers if config.target_modules and matches(name, config.target_modules)]
    except re.error as error:
        raise LoraMsError(f"target_modules {config.target_modules!r} is not a regular expression: {error}") from None
    names = [name for name in names if not any(part in name for part in config.exclude_layers)]
    check_heads(names)
    if not names:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in layers})
        excluded = f" outside exclude_layers {list(config.exclude_layers)}" if config.exclude_layers else ""
        raise LoraMsError(
            f"target_modules {config.target_modules!r} matches no dense layer{excluded}; "
            f"could match: {', '.join(leaves)}, or {ALL_LINEAR}"
        )
    return names


def check_heads(names: Iterable[str]) -> None:
    """Raises LoraMsError where ``names`` holds the head: its loss is computed from the weight alone, in chunks."""
    heads = [name for name in names if name.rsplit(".", 1)[-1] in HEADS]
    if heads:
        raise LoraMsError(f"an adapter on the head ({', '.join(heads)}) is not supported yet; use {ALL_LINEAR}")


def replace_cell(model: nn.Cell, name: str, cell: nn.Cell) -> None:
    """Puts ``cell`` at the dotted path ``name``."""
    *parents, leaf = name.split(".")
    owner = model
    for part in parents:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    setattr(owner, leaf, cell)


def name_parameters(model: nn.Cell) -> None:
    """Gives every parameter its dotted path as its name; what is shared keeps the first."""
    for name, parameter in model.parameters_and_names():
        parameter.name = name


def inject(model: nn.Cell, config: LoraConfig, names: Iterable[str] | None = None) -> InjectReport:
    """Swaps adapters in, in place; ``names`` (dotted paths) overrides the choice of ``config.target_modules``.

    Afterwards adapter parameters alone are trainable.
    """
    layers = dense_layers(model)
    chosen = select(model, config) if names is None else list(names)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    for name in chosen:
        layer = LoRADense.from_dense(layers[name], config.lora_rank, config.lora_alpha, config.lora_dropout)
        replace_cell(model, name, layer)
    name_parameters(model)
    return report(model)


def report(model: nn.Cell) -> InjectReport:
    """Counts what stands in ``model`` now."""
    parameters = list(model.get_parameters())
    return InjectReport(
        tuple(lora_layers(model)),
        sum(p.size for p in parameters if p.requires_grad),
        sum(p.size for p in parameters),
    )


def lora_layers(model: nn.Cell) -> dict[str, LoRADense]:
    """Every adapter by dotted path."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LoRADense)}


def freeze(model: nn.Cell, freeze_include: Iterable[str] = (), freeze_exclude: Iterable[str] = ()) -> None:
    """Freezes parameters whose path fits a shell pattern of ``freeze_include`` and none of ``freeze_exclude``.

    Raises:
        LoraMsError: a pattern that fits no parameter, or nothing left to train.
    """
    names = [name for name, _ in model.parameters_and_names()]
    for pattern in (*freeze_include, *freeze_exclude):
        if not fnmatch.filter(names, pattern):
            raise LoraMsError(f"freeze pattern {pattern!r} fits no parameter; the first are: {', '.join(names[:3])}")
    for name, parameter in model.parameters_and_names():
        included = any(fnmatch.fnmatch(name, pattern) for pattern in freeze_include)
        if included and not any(fnmatch.fnmatch(name, pattern) for pattern in freeze_exclude):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.get_parameters()):
        raise LoraMsError("nothing is left to train: freeze_include covers every trainable parameter")
