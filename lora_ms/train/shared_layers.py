"""A model's layers in blocks that share compiled graphs, forward and backward (see ``nn/sharing.py``)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn import sharing
from lora_ms.nn.graph import Graph
from lora_ms.nn.sharing import Place, kind_of, layers_in_blocks, parameters_of
from lora_ms.train.parts import ROTARY_TABLES, HalfLayers, HalfLayersBackward, ModelParts, kept_counts

# Layers of a block, which are compiled together: compilation takes a fifth less time than with blocks of three. Each
# alone takes less still, but a graph of up to 100 kernels is run in the caller's thread, without a thread that prepares
# the next kernel meanwhile: steps of 3 to 10% more time. A layer has some 50 kernels forward.
BLOCK_LAYERS = 2


class _BlockForward(Graph):
    """(x [t, h], rope …, visible of each layer …) -> of each half-layer what is kept of it …, and its output."""

    def __init__(self, half_layers: Sequence[nn.Cell], recomputed: Sequence[bool]):
        super().__init__(auto_prefix=False)
        self.half_layers = HalfLayers(half_layers, recomputed)

    def construct(self, x: Tensor, *others) -> tuple[Tensor, ...]:
        return self.half_layers(x, others[:ROTARY_TABLES], others[ROTARY_TABLES:])


class _BlockBackward(Graph):
    """(d output, rope …, visible of each layer …, of each half-layer its input and what is kept …) -> (d x, the
    gradient of what trains [n], if any does)."""

    def __init__(
        self, half_layers: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]], recomputed: Sequence[bool]
    ):
        super().__init__(auto_prefix=False)
        self.count = len(half_layers) + sum(kept_counts(half_layers, recomputed))  # of the tensors
        self.half_layers = HalfLayersBackward(half_layers, weights, recomputed)
        self.concat = ops.Concat(0)

    def construct(self, grad: Tensor, *others) -> tuple[Tensor, ...]:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES : -self.count]
        found = self.half_layers(grad, rope, visible, None, others[-self.count :])
        return (found[0], self.concat(found[1:])) if len(found) > 1 else found


class BlockGraphs:
    """The graphs of one block, which other blocks of its kind run as well.

    Args:
        members: the cells of the model that the half-layers consist of.
        weights: of each half-layer, the parameters that train.
        recomputed: of each half-layer, whether its activations are recomputed.
    """

    def __init__(
        self,
        half_layers: Sequence[nn.Cell],
        members: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        recomputed: Sequence[bool],
    ):
        self.forward = _BlockForward(half_layers, recomputed)
        self.backward = _BlockBackward(half_layers, weights, recomputed)
        self.place = Place(parameters_of(members))


class LayerBlock(Protocol):
    """Some layers, one after another; ``visible`` is of all layers of the model."""

    def forward(self, x: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What is kept for the gradient …, and the output."""

    def backward(
        self, grad: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """kept: the input, and what ``forward`` gave besides its output. Returns d x, and the gradients of what trains,
        if anything does."""


class Block:
    """A block: the graphs that it runs in, and the parameters that it runs them with.

    layers: indices of its layers, a slice. ``visible`` below is of all layers of the model.
    """

    def __init__(self, graphs: BlockGraphs, parameters: Sequence[Parameter], layers: slice):
        self.graphs = graphs
        self.parameters = parameters
        self.layers = layers

    def forward(self, x: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As ``_BlockForward``; inside ``SharedLayers.sharing`` alone."""
        self.graphs.place.take(self.parameters)
        return self.graphs.forward(x, *rope, *visible[self.layers])

    def backward(
        self, grad: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """As ``_BlockBackward``; inside ``SharedLayers.sharing`` alone."""
        self.graphs.place.take(self.parameters)
        return self.graphs.backward(grad, *rope, *visible[self.layers], *kept)


class SharedLayers:
    """The layers of a model below the top, in blocks of ``BLOCK_LAYERS``; all blocks of a kind run in the graphs of the
    first.

    Args:
        recomputed: of each half-layer of the model, whether its activations are recomputed.

    Attributes:
        top: index of the first half-layer that is in no block.
    """

    def __init__(self, parts: ModelParts, recomputed: Sequence[bool]):
        size = self.size = 2 * BLOCK_LAYERS  # half-layers of a block
        self.top = 2 * layers_in_blocks(len(parts.half_layers) // 2, BLOCK_LAYERS)
        self.blocks: list[LayerBlock] = []
        kinds: dict[Any, BlockGraphs] = {}
        for first in range(0, self.top, size):
            here = slice(first, first + size)
            members = [cell for cells in parts.members[here] for cell in cells]
            layers = slice(first // 2, (first + size) // 2)
            kind = (kind_of(members), tuple(recomputed[here]))
            if kind in kinds:
                self.blocks.append(Block(kinds[kind], parameters_of(members), layers))
            else:
                graphs = BlockGraphs(parts.half_layers[here], members, parts.weights[here], recomputed[here])
                kinds[kind] = graphs
                self.blocks.append(Block(graphs, graphs.place.kept, layers))
        self.graphs = list(kinds.values())

    def block_of(self, half_layer: int) -> int:
        """Index of the block with ``half_layer``; of one that is above all blocks, their number."""
        return min(half_layer // self.size, len(self.blocks))

    def sharing(self) -> AbstractContextManager[None]:
        """Inside, the parameters of the first block of a kind may have the memory of another block's."""
        return sharing.sharing([graphs.place for graphs in self.graphs])
