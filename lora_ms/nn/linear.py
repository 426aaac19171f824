"""What an operator that computes whole layers of a decoder is told of them (``Operators.cached_layers``)."""

from collections.abc import Iterable
from typing import NamedTuple

from mindspore import Parameter, nn

from lora_ms.nn.dropout import DropoutKernel

UPDATES = ("none", "low rank", "of lines")
"""What a linear layer adds to x W^T before its bias: nothing; ``scaling dropout(x) A^T B^T``, of A [rank, in], B [out,
rank] and scaling []; or an update for each line, of A [places, rank, in], B [places, rank, out] and the lines' choice
[lines]."""


class Operands(NamedTuple):
    """The parameters of a linear layer: the weight's, those of its update, and the bias [out], where there is one."""

    parameters: tuple[Parameter, ...]
    has_bias: bool
    update: str = UPDATES[0]
    factors: tuple[Parameter, ...] = ()  # A and B of a low rank
    dropout: DropoutKernel | None = None  # in training, before A

    def updated(self, update: str, *parameters: Parameter, dropout: DropoutKernel | None = None) -> "Operands":
        """With an update, of these parameters, which stand before the bias."""
        weight = self.parameters[:-1] if self.has_bias else self.parameters
        bias = self.parameters[len(weight) :]
        factors = parameters[:2] if update == "low rank" else ()
        return Operands((*weight, *parameters, *bias), self.has_bias, update, factors, dropout)


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
    """What a layer of a decoder consists of."""

    rotates: bool
    norms: list[Parameter]  # weights: of both norms, then of those of queries and keys, where there are any
    linear: list[Operands]  # of q, k, v, o, gate, up and down
    eps: float  # of the norms

    def parts(self, window: int, dropouts: Iterable[DropoutKernel | None] = (None,) * 7) -> list[int]:
        """The numbers that tell of the layer, whose window has the index ``window``.

        dropouts: of each linear layer, that of its update, if it drops anything; all follow one table.
        """
        found = [window, int(self.rotates), int(len(self.norms) > 2)]
        for operands, dropout in zip(self.linear, dropouts, strict=True):
            found += [UPDATES.index(operands.update), int(operands.has_bias)]
            found += (-1, 0) if dropout is None else dropout.draws.place()
        return found

    def parameters(self) -> list[Parameter]:
        """In the order in which operators take them."""
        return [*self.norms, *(parameter for operands in self.linear for parameter in operands.parameters)]


def known_layers(layers: Iterable[nn.Cell]) -> list[LayerOperands] | None:
    """Those of all ``layers``; None: adapters have changed more than linear layers."""
    found = [layer.operands() for layer in layers]
    return None if None in found else found
