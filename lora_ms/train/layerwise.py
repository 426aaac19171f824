"""A micro-batch layer by layer, activations computed again, in graphs that all layers of a kind share.

MindSpore keeps tens of MB for each compiled layer and takes a second for it. Here a half of a layer is compiled once,
forward and backward, and runs with the parameters of each layer in turn: ``set_data`` lends them by pointer, and the
next run of the graph takes it; nothing is copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.train.optim import FlatAdamW
from lora_ms.train.recompute import Backward, EmbeddingGradients, FinishGradients, Parts, Start, joined


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


class SharedGraphs:
    """The graphs of one half of a layer, to be run with the parameters of others.

    Args:
        half: the cell, and ``members``, the cells in it that hold its parameters.
        weights: the parameters that train.
    """

    def __init__(self, half: nn.Cell, members: Sequence[nn.Cell], weights: Sequence[Parameter]):
        self.forward, self.backward = half, Backward(half, ms.ParameterTuple(list(weights)))
        self.parameters = parameters_of(members)
        # what keeps the half's own values while it has another's
        self.own = [Parameter(Tensor(np.zeros(1), p.dtype), f"own.{p.name}", False) for p in self.parameters]


class SharedLayers:
    """The layers of a model, each half in the graphs of the first of its kind."""

    def __init__(self, parts: Parts, params: Sequence[Parameter] = ()):
        kinds: dict[Any, SharedGraphs] = {}
        self.halves: list[tuple[SharedGraphs, list[Parameter]]] = []  # and the values to run them with
        for half, members, ids in zip(parts.halves, parts.members, parts.held[1:-1], strict=True):
            kind = (type(half), kind_of(members))
            if kind in kinds:
                self.halves.append((kinds[kind], parameters_of(members)))
            else:
                kinds[kind] = SharedGraphs(half, members, [params[i] for i in ids])
                self.halves.append((kinds[kind], kinds[kind].own))
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

    def half(self, i: int) -> SharedGraphs:
        """The graphs of half i, with its values."""
        graphs, values = self.halves[i]
        lend(values, graphs.parameters)
        return graphs

    def inputs(self, i: int, x: Tensor, tables: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        """What half i is called with; rows [c]: the tokens that the last layer's output is wanted of."""
        if i % 2:
            return (x,)
        return (x, *tables, rows) if i == len(self.halves) - 2 else (x, *tables)


class LayerwiseStep:
    """Adds the gradient of one micro-batch's summed loss to the optimiser's ``grad``; returns that loss [].

    As ``MicroStep`` with all layers computed again: of each half of a layer only the input is kept.

    Args:
        loss: ``SummedLoss``.
        optimizer: of the trainable parameters.
    """

    def __init__(self, loss: nn.Cell, optimizer: FlatAdamW):
        params, decoder = optimizer.params, loss.model.model
        parts = Parts(loss.model, params)
        first, last = (ms.ParameterTuple([params[i] for i in parts.held[k]]) for k in (0, -1))
        self.start, self.embedding = Start(decoder), EmbeddingGradients(decoder, first)
        self.layers, self.lowest = SharedLayers(parts, params), parts.lowest
        self.finish = FinishGradients(loss, optimizer.loss_scale, last)
        self.tied, self.own = parts.tied, parts.own
        self.accumulate = _Accumulate(optimizer)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor) -> Tensor:
        layers, count = self.layers, len(self.layers.halves)
        x, *tables = self.start(input_ids, position_ids)
        inputs: list[tuple[Tensor, ...]] = []
        with layers.lending():
            for i in range(count):
                inputs.append(layers.inputs(i, x, tables, target_index))
                x = layers.half(i).forward(*inputs[-1])
            loss, grad, *rest = self.finish(x, targets)
            found: list[Tensor] = []
            for i in reversed(range(max(self.lowest - 1, 0), count)):
                grad, *own = layers.half(i).backward(*inputs.pop(), grad)
                found = own + found
        start = self.embedding(input_ids, grad) if self.lowest == 0 else ()
        first, last = joined(start, tuple(rest), self.tied, self.own)
        self.accumulate(*first, *found, *last)
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
        self.start, self.layers = Start(loss.model.model), SharedLayers(Parts(loss.model))
        self.finish = _Scores(loss)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, *tables = self.start(input_ids, position_ids)
        with self.layers.lending():
            for i in range(len(self.layers.halves)):
                x = self.layers.half(i).forward(*self.layers.inputs(i, x, tables, target_index))
        return self.finish(x, targets)


class _Scores(nn.Cell):
    """The last layer's output [c, h], targets [c] -> the two counts."""

    def __init__(self, loss: nn.Cell):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, right = self.loss.of_output(x, targets)
        return loss, right
