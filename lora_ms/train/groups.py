"""``optimizer.groups``: parameters with a learning rate and weight decay of their own."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mindspore import Parameter

from lora_ms.adapters.methods import PARAMETERS
from lora_ms.errors import LoraMsError

KINDS = ("adapters", "head", "base")


class Group(NamedTuple):
    """Some parameters, and the settings that replace the run's own for them; None: the run's own."""

    params: str  # one of KINDS, or a regular expression that fits whole dotted names
    learning_rate: float | None = None  # the highest; rises and falls with the run's
    weight_decay: float | None = None


def kind_of(name: str) -> str:
    """Which of KINDS parameter ``name`` belongs to."""
    if name.rpartition(".")[2] in PARAMETERS:
        return "adapters"
    return "head" if name.startswith("lm_head.") else "base"


def assign(names: Sequence[str], groups: Sequence[Group]) -> list[Group | None]:
    """For each parameter the first group that it belongs to; None for none.

    Raises:
        LoraMsError: a group without parameters; what there is to train is listed.
    """

    def fits(group: Group, name: str) -> bool:
        return kind_of(name) == group.params if group.params in KINDS else bool(re.fullmatch(group.params, name))

    found = [next((group for group in groups if fits(group, name)), None) for name in names]
    empty = [group.params for group in groups if group not in found]
    if empty:
        there = ", ".join(kind for kind in KINDS if kind in map(kind_of, names))
        raise LoraMsError(
            f"optimizer.groups: params {empty[0]!r} matches no trainable parameter outside the earlier groups; "
            f"trainable: {there} (such as {names[0]})"
        )
    return found


def rates_and_decays(
    params: Mapping[str, Parameter], groups: Sequence[Group], learning_rate: float, weight_decay: float
) -> tuple[list[float], list[float]]:
    """For each parameter, the factor of the run's learning rate, and the weight decay.

    Raises:
        LoraMsError: a group that fits nothing, or one with a rate where the run's own is 0.
    """
    if learning_rate == 0 and any(group.learning_rate for group in groups):
        raise LoraMsError("optimizer.groups give learning rates, and learning_rate is 0: set it above 0")
    rates: list[float] = []
    decays: list[float] = []
    for group in assign(list(params), groups):
        own = group or Group("")
        rates.append(1.0 if own.learning_rate is None else own.learning_rate / (learning_rate or 1.0))
        decays.append(weight_decay if own.weight_decay is None else own.weight_decay)
    return rates, decays


def describe(
    params: Mapping[str, Parameter], groups: Sequence[Group], learning_rate: float, weight_decay: float
) -> list[str]:
    """A line for each group and for the rest: how many numbers, at what rate."""
    sizes: dict[Group | None, int] = {}
    for parameter, group in zip(params.values(), assign(list(params), groups), strict=True):
        sizes[group] = sizes.get(group, 0) + parameter.size
    lines = []
    for group in [*groups, None]:
        if group in sizes:
            rate = learning_rate if group is None or group.learning_rate is None else group.learning_rate
            decay = weight_decay if group is None or group.weight_decay is None else group.weight_decay
            name = "the rest" if group is None else group.params
            lines.append(f"optimizer: {name}: {sizes[group]:,} numbers, learning rate {rate:g}, weight decay {decay:g}")
    return lines
