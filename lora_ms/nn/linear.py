"""What an operator that computes a whole layer of a decoder must know of it."""

from collections.abc import Iterable
from typing import NamedTuple

from mindspore import Parameter, nn

UPDATES = ("none", "low rank", "of lines")
"""What a linear layer adds to x W^T before its bias: nothing; ``scaling x A^T B^T``, of A [rank, in], B [out, rank] and
scaling []; or an update for each line, of A [places, rank, in], B [places, rank, out] and the lines' choice [lines]."""


class Operands(NamedTuple):
    """The parameters of a linear layer: the weight's, those of its update, and the bias [out], where there is one."""

    parameters: tuple[Parameter, ...]
    has_bias: bool
    update: str = UPDATES[0]

    def updated(self, update: str, *parameters: Parameter) -> "Operands":
        """With an update, of these parameters, which stand before the bias."""
        weight = self.parameters[:-1] if self.has_bias else self.parameters
        bias = self.parameters[len(weight) :]
        return Operands((*weight, *parameters, *bias), self.has_bias, update)


class LinearLayer:
    """A cell that is a linear layer, or stands in its place."""

    def operands(self) -> Operands | None:
        """What it consists of, where it is ``x W^T``, an update of ``UPDATES`` and a bias; None: it is more."""
        return None


def operands_of(cells: Iterable[nn.Cell]) -> list[Operands] | None:
    """Those of all ``cells``; None: one of them is more than a linear layer."""
    found = [cell.operands() if isinstance(cell, LinearLayer) else None for cell in cells]
    known = [operands for operands in found if operands is not None]
    return known if len(known) == len(found) else None


class LayerOperands(NamedTuple):
    """What ``Operators.cached_layers`` is told of a layer, but for its window and its part of the cache."""

    parts: list[int]
    parameters: list[Parameter]
    eps: float  # of the norms
