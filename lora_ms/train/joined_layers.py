"""The lower layers of a model as one operator, and their gradient as another: where only LoRA's factors train, and the
operator knows all that the layers compute. The compiler sees a few nodes, however deep the model is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn

from lora_ms.nn.dropout import DropoutKernel
from lora_ms.nn.graph import Graph
from lora_ms.nn.linear import LayerOperands, known_layers
from lora_ms.train.parts import ROTARY_TABLES, ModelParts
from lora_ms.train.shared_layers import LayerBlock


class Known(NamedTuple):
    """Layers of a decoder, from its first one on."""

    operands: list[LayerOperands]
    windows: list[int]  # of each, the index of its window
    dropouts: list[list[DropoutKernel | None]]  # of each linear layer, what is dropped out before its update
    operator: nn.Cell  # ``Operators.trained_layers``


class _Joined(Graph):
    """What both directions take.

    Not kept on disk: to read such a graph takes MindSpore as long as to compile it, a third of a second, and memory for
    all weights, which it makes anew and throws away. The cells of the layers are not in it, which would take as long
    again.
    """

    stored = False

    def __init__(self, known: Known):
        super().__init__(auto_prefix=False)
        told = zip(known.operands, known.windows, known.dropouts, strict=True)
        parts = [number for operands, window, dropouts in told for number in operands.parts(window, dropouts)]
        self.parts = Tensor(np.array([len(known.operands), *parts], np.int32))
        all_dropouts = [one for own in known.dropouts for one in own]
        rates = [0.0 if one is None else one.probability for one in all_dropouts]
        self.rates = Tensor(np.array([[rate, 1 / (1 - rate)] for rate in rates], np.float32))
        tables = [one.draws.table for one in all_dropouts if one is not None]
        self.table = tables[0] if tables else Tensor(np.zeros((1, 1), np.float32))
        self.parameters = ParameterTuple([p for operands in known.operands for p in operands.parameters()])
        self.operator = known.operator


class JoinedForward(_Joined):
    """(x [t, h], rope …, visible of each window …) -> [t, h]."""

    def construct(self, x: Tensor, *others) -> Tensor:
        about = (self.parts, others[:ROTARY_TABLES], others[ROTARY_TABLES:])
        return self.operator(x, about, (self.table, self.rates), self.parameters)


class JoinedKeeping(JoinedForward):
    """The same; what the gradient needs is kept."""

    def construct(self, x: Tensor, *others) -> Tensor:
        about = (self.parts, others[:ROTARY_TABLES], others[ROTARY_TABLES:])
        return self.operator.keeping(x, about, (self.table, self.rates), self.parameters)


class JoinedBackward(_Joined):
    """(x [t, h], d output, rope …, visible of each window …) -> d x, and the gradient of the factors [n].

    lowest: the first half-layer that has a gradient. of_input: whether x has one.
    """

    def __init__(self, known: Known, lowest: int, of_input: bool):
        super().__init__(known)
        self.wanted = Tensor(np.array([lowest, of_input], np.int32))

    def construct(self, x: Tensor, grad: Tensor, *others) -> tuple[Tensor, Tensor]:
        about = (self.parts, others[:ROTARY_TABLES], others[ROTARY_TABLES:])
        back = (grad, self.wanted)
        return self.operator.backward(x, about, (self.table, self.rates), self.parameters, back)


class JoinedLayers:
    """As ``SharedLayers``, with all layers but the last in one block, which is itself.

    Args:
        trains: whether what the gradient needs is kept.
    """

    def __init__(self, parts: ModelParts, known: Known, trains: bool):
        self.top = 2 * len(known.operands)
        self.blocks: list[LayerBlock] = [self]
        windows = range(max(known.windows) + 1)
        self.seen = [known.windows.index(i) if i in known.windows else 0 for i in windows]  # a layer with each window
        keeps = trains and parts.lowest_half_layer < self.top
        self.keeping = JoinedKeeping(known) if keeps else JoinedForward(known)
        if keeps:
            self.gradient = JoinedBackward(known, parts.lowest_half_layer, parts.trains_embedding)

    def block_of(self, half_layer: int) -> int:
        """0, or 1 of one that is above the block."""
        return int(half_layer >= self.top)

    def sharing(self) -> AbstractContextManager[None]:
        """Nothing is shared."""
        return nullcontext()

    def forward(self, x: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor]) -> tuple[Tensor]:
        """The output."""
        return (self.keeping(x, *rope, *(visible[i] for i in self.seen)),)

    def backward(
        self, grad: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """kept: the input of ``forward``, whose last call this is the gradient of."""
        return self.gradient(kept[0], grad, *rope, *(visible[i] for i in self.seen))


def joined_layers(model: nn.Cell, parts: ModelParts, trains: bool) -> JoinedLayers | None:
    """The layers of ``model`` but the last, where exactly LoRA's factors train of what they have; None: there is no
    operator for them.

    trains: whether what the gradient needs is kept, and dropout drops.
    """
    layers = [half.layer for half in parts.half_layers[:-2:2]]
    make, operands = model.operators.trained_layers, known_layers(layers)
    if make is None or not layers or operands is None:
        return None
    dropouts = [[dropout_of(one.dropout) if trains else None for one in layer.linear] for layer in operands]
    everything = [one for layer in operands for one in layer.linear]
    if any(one.update == "of lines" or any(p.dtype != ms.float32 for p in one.factors) for one in everything):
        return None
    if any(one is not None and not one.draws.followed for own in dropouts for one in own):
        return None
    if trains:
        halves = [half for layer in operands for half in (layer.linear[:4], layer.linear[4:])]
        factors = [[p for one in half for p in one.factors] for half in halves]
        if [[*map(id, own)] for own in parts.weights[:-2]] != [[*map(id, own)] for own in factors]:
            return None
        if not any(factors) and parts.lowest_half_layer < 2 * len(layers):  # what is below alone
            return None
    operator = make(operands[0].eps, sum(p.size for one in everything for p in one.factors))
    windows = list(model.model.window_indices[: len(layers)])
    return JoinedLayers(parts, Known(operands, windows, dropouts, operator), trains)


def dropout_of(dropout: Any) -> DropoutKernel | None:
    """It, if it drops anything now."""
    return dropout if dropout is not None and dropout.training and dropout.probability > 0 else None
