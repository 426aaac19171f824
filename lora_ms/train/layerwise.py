"""A micro-batch block by block of layers, in graphs that all blocks of a kind share.

MindSpore keeps some 50 MB for each compiled layer and takes a second for it. Here a block is compiled once, forward and
backward, and runs with the parameters of each block in turn: ``set_data`` lends them by pointer, and the next run of
the graph takes it; nothing is copied (so on the CPU; not tried on Ascend). In a training step a block keeps the inputs
of its layers' halves, and computes the rest again for its backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.graph import Graph
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.recompute import EmbeddingGradients, Halves, HalvesGradients, Parts, Start, UpperGradients, joined

# of a block. MindSpore runs a graph of up to 100 kernels in the caller's thread, which then waits for the two others in
# a loop of its own: three threads on two cores, and half the speed, now and then. A layer has some 50 forward.
LAYERS = 3


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


def lend(values: Sequence[Parameter], holders: Sequence[Parameter]) -> None:
    """Lets each holder stand for the memory of the value."""
    for value, holder in zip(values, holders, strict=True):
        holder.set_data(value, slice_shape=True)


class _BlockGradients(Graph):
    """(d output, rotary tables …, mask, the inputs of all halves …) -> (d x, that of what trains [n], if any does)."""

    def __init__(self, halves: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]]):
        super().__init__(auto_prefix=False)
        self.halves, self.concat = HalvesGradients(halves, weights, [True] * len(halves)), ops.Concat(0)

    def construct(self, grad, cos_q, sin_q, cos_k, sin_k, bias, *inputs) -> tuple[Tensor, ...]:
        found = self.halves(grad, cos_q, sin_q, cos_k, sin_k, bias, None, *inputs)
        return (found[0], self.concat(found[1:])) if len(found) > 1 else found


class _TopScores(Graph):
    """The last layers, norm and head: (x, rotary tables …, mask, rows [c], targets [c]) -> ``LabelScores``' two."""

    def __init__(self, halves: Sequence[nn.Cell], loss: nn.Cell):
        super().__init__(auto_prefix=False)
        self.halves, self.loss = Halves(halves), loss

    def construct(self, x, cos_q, sin_q, cos_k, sin_k, bias, rows, targets) -> tuple[Tensor, Tensor]:
        outputs = self.halves(x, cos_q, sin_q, cos_k, sin_k, bias, rows)
        loss, _, right = self.loss.of_output(outputs[-1], targets)
        return loss, right


class SharedGraphs:
    """The graphs of one block, to be run with the parameters of others.

    Args:
        halves: the cells, and ``members``, the cells in them that hold their parameters.
        weights: of each half, the parameters that train.
    """

    def __init__(self, halves: Sequence[nn.Cell], members: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]]):
        self.forward, self.backward = Halves(halves), _BlockGradients(halves, weights)
        self.parameters = parameters_of(members)
        # what keeps the block's own values while it has another's
        self.own = [Parameter(Tensor(np.zeros(1), p.dtype), f"own.{p.name}", False) for p in self.parameters]


class SharedBlocks:
    """The layers of a model below the top, in blocks of ``LAYERS``, each in the graphs of the first of its kind."""

    def __init__(self, parts: Parts, weights: Sequence[Sequence[Parameter]]):
        """weights: of each half, the parameters that train."""
        count = len(parts.halves)
        self.top = (count - 1) // (2 * LAYERS) * 2 * LAYERS  # the first half that is not in a block
        kinds: dict[Any, SharedGraphs] = {}
        self.blocks: list[tuple[SharedGraphs, list[Parameter]]] = []  # and the values to run them with
        for first in range(0, self.top, 2 * LAYERS):
            place = slice(first, first + 2 * LAYERS)
            members = [cell for cells in parts.members[place] for cell in cells]
            kind = kind_of(members)
            if kind in kinds:
                self.blocks.append((kinds[kind], parameters_of(members)))
            else:
                kinds[kind] = SharedGraphs(parts.halves[place], members, weights[place])
                self.blocks.append((kinds[kind], kinds[kind].own))
        self.graphs = list(kinds.values())

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Inside the block, the first layers of a kind may have the values of others."""
        for graphs in self.graphs:
            lend(graphs.parameters, graphs.own)
        try:
            yield
        finally:
            for graphs in self.graphs:
                lend(graphs.own, graphs.parameters)

    def block(self, i: int) -> SharedGraphs:
        """The graphs of block i, with its values."""
        graphs, values = self.blocks[i]
        lend(values, graphs.parameters)
        return graphs


class LayerwiseStep:
    """Adds the gradient of one micro-batch's summed loss to the optimiser's ``grad``; returns that loss [].

    As ``MicroStep`` with all layers computed again. Its graphs, which are small, are compiled when they are first run.

    Args:
        loss: ``SummedLoss``.
        optimizer: of the trainable parameters.
    """

    def __init__(self, loss: nn.Cell, optimizer: FlatAdamW):
        params, decoder = optimizer.params, loss.model.model
        parts = Parts(loss.model, params)
        self.start = Start(decoder)
        first, *weights, rest = parts.of(params)
        self.embedding = EmbeddingGradients(decoder, first)
        self.blocks = SharedBlocks(parts, weights)
        top = self.blocks.top
        halves, lowest = parts.halves[top:], max(parts.lowest - 1 - top, 0)
        again = [True] * len(halves)
        self.upper = UpperGradients(loss, optimizer.loss_scale, halves, weights[top:], rest, again, lowest)
        # the lowest block that a gradient must pass, and whether it goes on to the embedding
        self.lowest, self.to_embedding = max(parts.lowest - 1, 0) // (2 * LAYERS), parts.lowest == 0
        self.tied, self.own = parts.tied, parts.own
        self.accumulate = _Accumulate(optimizer)

    def prepare(self, *batch: Tensor) -> None:
        """Nothing: see ``MicroStep.prepare``."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor) -> Tensor:
        x, *tables = self.start(input_ids, position_ids)
        kept: list[tuple[Tensor, ...]] = []
        found: list[Tensor] = []
        with self.blocks.lending():
            for i in range(len(self.blocks.blocks)):
                kept.append((x, *self.blocks.block(i).forward(x, *tables)))
                x = kept[-1][-1]
            loss, grad, *upper = self.upper(x, *tables, target_index, targets)
            for i in reversed(range(self.lowest, len(self.blocks.blocks))):
                grad, *own = self.blocks.block(i).backward(grad, *tables, *kept.pop()[:-1])
                found = own + found
        start = self.embedding(input_ids, grad) if self.to_embedding else ()
        first, last = joined(start, tuple(upper[self.upper.vectors :]), self.tied, self.own)
        self.accumulate(*first, *found, *upper[: self.upper.vectors], *last)
        return loss


class _Accumulate(nn.Cell):
    """Adds the gradients that all parts found to the optimiser's ``grad``."""

    def __init__(self, optimizer: FlatAdamW):
        super().__init__(auto_prefix=False)
        self.optimizer, self.flatten = optimizer, optimizer.flatten

    def construct(self, *found) -> Tensor:
        return ops.assign_add(self.optimizer.grad, self.flatten(found))


class LabelScores:
    """What an evaluation counts, of the batch that ``SummedLoss`` takes.

    -> (summed cross-entropy [] float32, label tokens that have the highest logit [] float32).
    """

    def __init__(self, loss: nn.Cell):
        parts = Parts(loss.model)
        self.start, self.blocks = Start(loss.model.model), SharedBlocks(parts, [()] * len(parts.halves))
        self.top = _TopScores(parts.halves[self.blocks.top :], loss)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, *tables = self.start(input_ids, position_ids)
        with self.blocks.lending():
            for i in range(len(self.blocks.blocks)):
                x = self.blocks.block(i).forward(x, *tables)[-1]
        return self.top(x, *tables, target_index, targets)
