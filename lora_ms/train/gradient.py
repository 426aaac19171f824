"""The gradient of a micro-batch's loss, added to the optimiser's: one engine, however deep the model is, and however
much is recomputed.

Where only LoRA trains below the last layer and nothing is recomputed, these layers are one block of one operator
(``joined_layers.py``), which nobody compiles.

A few layers: one graph, in which MindSpore differentiates the model as one part and keeps every activation.

More layers: the same in several graphs. Blocks of a few layers run one after another in graphs that they share
(``shared_layers.py``), so that neither compilation nor its memory grows with the depth; the top layers and the finish
are one graph. A forward graph hands over what the backward graph of its block needs (``HalfLayersBackward``).

Recomputed layers: of a recomputed half-layer its input alone is kept; the backward pass computes the rest again. That
is less memory and more time.

The numbers are the same in all of them, to the bit. Recomputed dropout meets the same zeros: it draws from a table that
does not change within a step (``nn/dropout.py``).

``Cell.recompute`` would be simpler, but saves next to nothing here: MindSpore takes a gradient that a cell writes by
hand (``bprop``, as most of ours do) for a part of the forward pass, and keeps whatever such cells take and give.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from mindspore import Parameter, Tensor, ops

from lora_ms.errors import LoraMsError
from lora_ms.nn import sharing
from lora_ms.nn.graph import Graph
from lora_ms.train.joined_layers import JoinedLayers, joined_layers, lower_layers
from lora_ms.train.parts import (
    EmbeddingGradients,
    LayerInputs,
    LossGradients,
    ModelParts,
    SummedLoss,
    TopGradients,
    merge_tied,
)
from lora_ms.train.shared_layers import SharedLayers


def recomputed_layers(recompute: bool | int | Sequence[int], count: int) -> list[int]:
    """Indices of the layers, of ``count``, to recompute: True all, False none, N the N lowest, a list those in it.

    Raises:
        LoraMsError: there is no such layer.
    """
    if isinstance(recompute, bool):
        return list(range(count)) if recompute else []
    chosen = list(range(recompute)) if isinstance(recompute, int) else sorted({*recompute})
    if chosen and max(chosen) >= count:
        raise LoraMsError(f"recompute_config.recompute {recompute}: the model has {count} layers, counted from 0")
    return chosen


class GradientHolder(Protocol):
    """Where the gradients go: ``FlatAdamW``, or what else has these."""

    params: Any  # in the order of the vector
    grad: Parameter  # [n] float32
    loss_scale: Parameter  # [] float32
    flatten: Any


class MicroStep(Graph):
    """Adds the gradient of one micro-batch's summed loss to the optimiser's ``grad``; returns that loss.

    input_ids, position_ids [b, s], target_index [c], targets [c], further arrays … -> as ``SummedLoss``.

    Args:
        recompute: the layers whose activations are recomputed in the backward pass, as ``recomputed_layers`` takes it.
            The optimiser's parameters stand in the model's order.
    """

    title = "the training step"

    def __init__(self, loss: SummedLoss, optimizer: GradientHolder, recompute: bool | int | Sequence[int] = False):
        super().__init__(auto_prefix=False)
        decoder, scale = loss.model.model, optimizer.loss_scale
        count = len(decoder.layers)
        layers = recomputed_layers(recompute, count)
        shares_graphs = (loss.model.operators.lends_memory and count >= sharing.SHARED_FROM) or len(layers) == count
        self.shared: SharedLayers | JoinedLayers | None = None
        self.prepared: set[tuple] = set()  # shapes of batches
        if not layers and lower_layers(loss.model) is not None:
            self.shared = joined_layers(loss.model, ModelParts(loss.model, optimizer.params), trains=True)
        self.is_whole = not layers and not shares_graphs and self.shared is None
        if self.is_whole:
            self.whole = LossGradients(loss, scale, optimizer.params, of_input=False)
            self.accumulate = Accumulate(optimizer)
            return
        parts = ModelParts(loss.model, optimizer.params)
        recomputed = [i // 2 in layers for i in range(2 * count)]
        self.lowest = parts.lowest_half_layer
        if self.shared is None and shares_graphs:
            self.shared = SharedLayers(parts, recomputed)
        first = 0 if self.shared is None else self.shared.top  # the first half-layer that is in no block
        self.inputs = LayerInputs(decoder)
        self.top = TopGradients(
            loss.finish,
            scale,
            parts.finish_weights,
            half_layers=parts.half_layers[first:],
            weights=parts.weights[first:],
            recomputed=recomputed[first:],
            lowest=max(self.lowest - first, 0),
        )
        self.trains_embedding = parts.trains_embedding
        self.embedding = EmbeddingGradients(decoder, parts.embedding_weights)
        self.accumulate = Accumulate(optimizer, parts.ties)

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor, *extras: Tensor
    ) -> Tensor:
        """All of it as one graph; with ``shared``, ``__call__`` runs several graphs instead."""
        if self.is_whole:
            found = self.whole(input_ids, position_ids, target_index, targets, *extras)
            self.accumulate(*found[1:])
            return found[0]
        x, rope, visible = self.inputs.by_layer(self.inputs(input_ids, position_ids))
        found = self.top(x, *rope, *visible, target_index, targets, *extras)
        embedding = self.embedding(input_ids, found[1]) if self.trains_embedding else ()
        self.accumulate(*embedding, *found[2:])
        return found[0]

    def __call__(self, *batch: Tensor) -> Tensor:
        if self.shared is None:
            return super().__call__(*batch)
        return self._in_shared_graphs(self.shared, *batch)

    def _in_shared_graphs(
        self,
        shared: SharedLayers | JoinedLayers,
        input_ids: Tensor,
        position_ids: Tensor,
        target_index: Tensor,
        *ends: Tensor,
    ) -> Tensor:
        """ends: targets, further arrays …"""
        x, rope, visible = self.inputs.by_layer(self.inputs(input_ids, position_ids))
        lowest = shared.block_of(self.lowest)  # the first block that needs a gradient
        kept: list[tuple[Tensor, ...]] = []  # of each block from there on, what its gradient needs
        lower: list[Tensor] = []
        with shared.sharing():
            for i, block in enumerate(shared.blocks):
                outputs = block.forward(x, rope, visible)
                if i >= lowest:
                    kept.append((x, *outputs[:-1]))
                x = outputs[-1]
            loss, grad, *upper = self.top(x, *rope, *visible[shared.top // 2 :], target_index, *ends)
            for block in reversed(shared.blocks[lowest:]):
                grad, *own = block.backward(grad, rope, visible, kept.pop())
                lower = own + lower
        embedding = self.embedding(input_ids, grad) if self.trains_embedding else ()
        self.accumulate(*embedding, *lower, *upper)
        return loss

    def prepare(self, *batch: Tensor) -> None:
        """Compiles for batches of this shape, once, and hands back what the compiler has freed (8 MB a layer) before
        the first step takes memory of its own: glibc keeps it otherwise. Shared graphs, which are small, are compiled
        when they are first run."""
        shapes = tuple(tuple(part.shape) for part in batch)
        if self.shared is not None or shapes in self.prepared:
            return
        self.prepared.add(shapes)
        self.compile(*batch)
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every libc
            if trim is not None:
                trim(0)


class Accumulate(Graph):
    """Adds the gradients of all parameters, in the optimiser's order, to its ``grad``.

    ties: pairs of them that belong to one parameter, as ``merge_tied`` takes them.
    """

    def __init__(self, optimizer: GradientHolder, ties: tuple[tuple[int, int], ...] = ()):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.flatten = optimizer.flatten
        self.ties = ties

    def construct(self, *gradients) -> Tensor:
        return ops.assign_add(self.optimizer.grad, self.flatten(merge_tied(gradients, self.ties)))
