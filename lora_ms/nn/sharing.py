"""Layers that share compiled graphs: a few are compiled, and run with the parameters of others in turn.

MindSpore keeps some 50 MB for each compiled layer and takes a second for it. A parameter can be given the memory of
another, and the next run of a compiled graph uses it; nothing is copied (so on the CPU; not tried on Ascend).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

# From so many layers on they share graphs. Fewer are compiled as fast in one graph, in which a token takes an eighth
# less time and a training step a fiftieth less memory.
SHARED_FROM = 16


def layers_in_blocks(layers: int, size: int) -> int:
    """How many of a model's layers, from the lowest, make blocks of ``size``: all but one to ``size``, the top."""
    return (layers - 1) // size * size


def kind_of(cells: Sequence[nn.Cell]) -> tuple:
    """Equal for cells that compute the same but for the values of their parameters."""
    plain = (bool, int, float, str, tuple, type, ms.Type, type(None))
    return tuple(
        (
            name,
            type(part),
            *((key, value) for key, value in vars(part).items() if key[0] != "_" and isinstance(value, plain)),
            *((key, value.asnumpy().tobytes()) for key, value in vars(part).items() if is_constant(value)),
            *((key, p.shape, p.dtype, p.requires_grad) for key, p in part.parameters_and_names(expand=False)),
        )
        for cell in cells
        for name, part in cell.cells_and_names()
    )


def is_constant(value: object) -> bool:
    """Whether a cell's attribute is a tensor that a compiled graph holds for good."""
    return isinstance(value, Tensor) and not isinstance(value, Parameter)


def parameters_of(cells: Sequence[nn.Cell]) -> list[Parameter]:
    """All of them, in the order of the cells."""
    return [parameter for cell in cells for parameter in cell.get_parameters()]


def share_memory(owners: Sequence[Parameter], users: Sequence[Parameter]) -> None:
    """Each user has the memory, and so the value, of its owner from now on."""
    for owner, user in zip(owners, users, strict=True):
        user.assign_value(owner)  # a tenth of the time of set_data, which checks types and shapes first


class Place:
    """The parameters of a compiled part, which other parts of its kind take the place of.

    Attributes:
        own: the part's own parameters.
        kept: these have the memory of ``own`` while another part is in its place.
    """

    def __init__(self, own: Sequence[Parameter]):
        self.own = list(own)
        self.kept = [Parameter(Tensor(np.zeros(1), p.dtype), f"kept.{p.name}", False) for p in self.own]

    def take(self, parameters: Sequence[Parameter]) -> None:
        """The graph computes with the values of ``parameters`` from now on; inside ``sharing`` alone."""
        share_memory(parameters, self.own)


@contextmanager
def sharing(places: Sequence[Place]) -> Iterator[None]:
    """Inside, other parts may take these places; afterwards everything has its own memory."""
    for place in places:
        share_memory(place.own, place.kept)
    try:
        yield
    finally:
        for place in places:
            share_memory(place.kept, place.own)
