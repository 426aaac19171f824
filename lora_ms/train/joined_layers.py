"""The lower layers of a model as one operator, and their gradient as another: where only LoRA's factors train, and the
operator knows all that the layers compute. There is nothing to compile of them, however deep the
model is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from lora_ms.nn.dropout import DropoutKernel
from lora_ms.nn.linear import LayerOperands, known_layers
from lora_ms.ops.operators import TrainedLayers
from lora_ms.train.parts import ModelParts
from lora_ms.train.shared_layers import LayerBlock


class JoinedLayers:
    """As ``SharedLayers``, with all layers but the last in one block, which is itself.

    Args:
        operands: of the layers.
        windows: of each layer, the index of its window.
        dropouts: of each layer's linear layers, what is dropped out before its update.
        trains: whether what the gradient needs is kept.
    """

    def __init__(
        self,
        parts: ModelParts,
        operands: Sequence[LayerOperands],
        windows: Sequence[int],
        dropouts: Sequence[Sequence[DropoutKernel | None]],
        make: Callable[..., TrainedLayers],
        trains: bool,
    ):
        self.top = 2 * len(operands)
        self.blocks: list[LayerBlock] = [self]
        self.seen = [windows.index(i) if i in windows else 0 for i in range(max(windows) + 1)]  # a layer with each
        self.keeps = trains and parts.lowest_half_layer < self.top
        all_dropouts = [one for own in dropouts for one in own]
        tables = [one.draws.table for one in all_dropouts if one is not None]
        self.draws = tables[0] if tables else Tensor(np.zeros((1, 1), np.float32))
        told = [one.parts(window, own) for one, window, own in zip(operands, windows, dropouts, strict=True)]
        self.layers = make(
            eps=operands[0].eps,
            parts=[len(operands), *(number for own in told for number in own)],
            parameters=[p for one in operands for p in one.parameters()],
            rates=[0.0 if one is None else one.probability for one in all_dropouts],
            wanted=(parts.lowest_half_layer, parts.trains_embedding),
            factors=sum(p.size for one in operands for linear in one.linear for p in linear.factors),
        )

    def block_of(self, half_layer: int) -> int:
        """0, or 1 of one that is above the block."""
        return int(half_layer >= self.top)

    def sharing(self) -> AbstractContextManager[None]:
        """Nothing is shared."""
        return nullcontext()

    def forward(self, x: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor]) -> tuple[Tensor]:
        """The output."""
        compute = self.layers.keeping if self.keeps else self.layers
        return (compute(x, rope, self.draws, [visible[i] for i in self.seen]),)

    def backward(
        self, grad: Tensor, rope: Sequence[Tensor], visible: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """kept: the input of ``forward``, whose last call this is the gradient of."""
        return self.layers.backward(kept[0], grad, rope, self.draws, [visible[i] for i in self.seen])


def lower_layers(model: nn.Cell) -> list[LayerOperands] | None:
    """What the layers of ``model`` but the last consist of; None: there is no operator for them."""
    layers = list(model.model.layers)[:-1]
    return known_layers(layers) if layers and model.operators.trained_layers is not None else None


def joined_layers(model: nn.Cell, parts: ModelParts, trains: bool) -> JoinedLayers | None:
    """The layers of ``model`` but the last, where exactly LoRA's factors train of what they have; None: there is no
    operator for them.

    trains: whether what the gradient needs is kept, and dropout drops.
    """
    make, operands = model.operators.trained_layers, lower_layers(model)
    if make is None or operands is None:
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
        if not any(factors) and parts.lowest_half_layer < 2 * len(operands):  # what is below alone
            return None
    return JoinedLayers(parts, operands, model.model.window_indices[: len(operands)], dropouts, make, trains)


def dropout_of(dropout: Any) -> DropoutKernel | None:
    """It, if it drops anything now."""
    return dropout if dropout is not None and dropout.training and dropout.probability > 0 else None
