"""Blocks of layers that share compiled graphs.

MindSpore keeps some 50 MB for each compiled layer and takes a second for it. Here a block of a few layers is compiled
once, forward and backward, and runs with the parameters of each block in turn: ``set_data`` gives a parameter the
memory of another, and the next run of the graph uses it; nothing is copied (so on the CPU; not tried on Ascend).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.graph import Graph
from lora_ms.train.parts import HalfLayers, HalfLayersBackward, ModelParts

# Layers of a block. MindSpore runs a graph of up to 100 kernels in the caller's thread, which then waits for the two
# others in a loop of its own: three threads on two cores, and half the speed, now and then. A layer has some 50
# forward.
BLOCK_LAYERS = 3


def kind_of(cells: Sequence[nn.Cell]) -> tuple:
    """Equal for cells that compute the same but for the values of their parameters."""
    plain = (bool, int, float, str, tuple, type, ms.Type, type(None))
    return tuple(
        (
            name,
            type(part),
            *((key, value) for key, value in vars(part).items() if key[0] != "_" and isinstance(value, plain)),
            *((key, p.shape, p.dtype, p.requires_grad) for key, p in part.parameters_and_names(expand=False)),
        )
        for cell in cells
        for name, part in cell.cells_and_names()
    )


def parameters_of(cells: Sequence[nn.Cell]) -> list[Parameter]:
    """All of them, in the order of the cells."""
    return [parameter for cell in cells for parameter in cell.get_parameters()]


def share_memory(owners: Sequence[Parameter], users: Sequence[Parameter]) -> None:
    """Each user has the memory, and so the value, of its owner from now on."""
    for owner, user in zip(owners, users, strict=True):
        user.set_data(owner, slice_shape=True)


class _BlockForward(Graph):
    """(x [t, h], context …) -> the outputs of all half-layers …."""

    def __init__(self, half_layers: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.half_layers = HalfLayers(half_layers)

    def construct(self, x: Tensor, *context) -> tuple[Tensor, ...]:
        return self.half_layers(x, context)


class _BlockBackward(Graph):
    """(d output, context …, the inputs of all half-layers …) -> (d x, the gradient of what trains [n], if any does)."""

    def __init__(self, half_layers: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]]):
        super().__init__(auto_prefix=False)
        self.count = len(half_layers)
        self.half_layers = HalfLayersBackward(half_layers, weights, [True] * self.count)
        self.concat = ops.Concat(0)

    def construct(self, grad: Tensor, *others) -> tuple[Tensor, ...]:
        context, inputs = others[: -self.count], others[-self.count :]
        found = self.half_layers(grad, context, None, inputs)
        return (found[0], self.concat(found[1:])) if len(found) > 1 else found


class BlockGraphs:
    """The graphs of one block, which other blocks of its kind run as well.

    Args:
        members: the cells of the model that the half-layers consist of.
        weights: of each half-layer, the parameters that train.
    """

    def __init__(
        self, half_layers: Sequence[nn.Cell], members: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]]
    ):
        self.forward = _BlockForward(half_layers)
        self.backward = _BlockBackward(half_layers, weights)
        self.parameters = parameters_of(members)
        # these have the memory of the block's own parameters while the block has another's
        self.kept = [Parameter(Tensor(np.zeros(1), p.dtype), f"kept.{p.name}", False) for p in self.parameters]


class Block:
    """A block: the graphs that it runs in, and the parameters that it runs them with."""

    def __init__(self, graphs: BlockGraphs, parameters: Sequence[Parameter]):
        self.graphs = graphs
        self.parameters = parameters

    def forward(self, x: Tensor, context: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As ``_BlockForward``; inside ``SharedLayers.sharing`` alone."""
        share_memory(self.parameters, self.graphs.parameters)
        return self.graphs.forward(x, *context)

    def backward(self, grad: Tensor, context: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As ``_BlockBackward``; inside ``SharedLayers.sharing`` alone."""
        share_memory(self.parameters, self.graphs.parameters)
        return self.graphs.backward(grad, *context, *inputs)


class SharedLayers:
    """The layers of a model below the top, in blocks of ``BLOCK_LAYERS``, each in the graphs of the first of its kind.

    Attributes:
        top: index of the first half-layer that is in no block.
    """

    def __init__(self, parts: ModelParts):
        size = self.size = 2 * BLOCK_LAYERS  # half-layers of a block
        self.top = (len(parts.half_layers) - 1) // size * size
        self.blocks: list[Block] = []
        kinds: dict[Any, BlockGraphs] = {}
        for first in range(0, self.top, size):
            half_layers = slice(first, first + size)
            members = [cell for cells in parts.members[half_layers] for cell in cells]
            kind = kind_of(members)
            if kind in kinds:
                self.blocks.append(Block(kinds[kind], parameters_of(members)))
            else:
                kinds[kind] = BlockGraphs(parts.half_layers[half_layers], members, parts.weights[half_layers])
                self.blocks.append(Block(kinds[kind], kinds[kind].kept))
        self.graphs = list(kinds.values())

    def blocks_from(self, half_layer: int) -> list[Block]:
        """The blocks from that of ``half_layer`` on."""
        return self.blocks[half_layer // self.size :]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, the parameters of the first block of a kind may have the memory of another block's."""
        for graphs in self.graphs:
            share_memory(graphs.parameters, graphs.kept)
        try:
            yield
        finally:
            for graphs in self.graphs:
                share_memory(graphs.kept, graphs.parameters)
