"""The gradient of a micro-batch with some layers' activations computed again: less memory, more time.

``Cell.recompute`` is not used: MindSpore takes a gradient that a cell writes out by hand (``bprop``) for a part of
the forward pass, so that nearly all activations would be kept.
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.errors import LoraMsError
from lora_ms.nn.graph import Graph
from lora_ms.train.optimizer import Flatten


class _Finish(nn.Cell):
    """Norm, head and loss: the last layer's output [c, h] -> (scaled loss [], loss [])."""

    def __init__(self, loss: nn.Cell, loss_scale: Parameter):
        super().__init__(auto_prefix=False)
        self.loss, self.loss_scale = loss, loss_scale

    def construct(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss.of_output(x, targets)[0]
        return loss * self.loss_scale.astype(ms.float32), loss


class Attend(nn.Cell):
    """The first half of a layer: x [t, h], rotary tables, mask, rows or none -> [t, h] or [c, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x, cos_q, sin_q, cos_k, sin_k, bias, rows=None) -> Tensor:
        return self.layer.attend(x, (cos_q, sin_q, cos_k, sin_k), bias, rows)


class Feed(nn.Cell):
    """The second half of a layer: x [t, h] -> [t, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor) -> Tensor:
        return self.layer.feed(x)


class Parts:
    """A model in the order of its computation, and which of ``params`` each part holds: the embedding, the halves of
    its layers, the rest.

    Attributes:
        halves: ``Attend`` and ``Feed`` in turn.
        members: the cells that are in each half.
        held: places in ``params`` of those that the embedding, each half and the rest hold.
        lowest: index in ``held`` of the lowest that holds any; nothing below needs a gradient.
        tied: for each parameter of the embedding its place among the rest's, -1 for none: a tied head has one.
        own: places of the others among the rest's.

    ``params`` must stand in that same order, which is the model's own.
    """

    def __init__(self, model: nn.Cell, params: Sequence[Parameter] = ()):
        self.halves: list[nn.Cell] = []
        self.members: list[tuple[nn.Cell, ...]] = []
        for layer in model.model.layers:
            self.halves += [Attend(layer), Feed(layer)]
            self.members += [(layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)]
        start, *inner = (held(params, *cells) for cells in ((model.model.embed_tokens,), *self.members))
        below = {i for ids in inner for i in ids} | {*start} - {*held(params, model.lm_head)}
        rest = [i for i in range(len(params)) if i not in below]
        self.held = [start, *inner, rest]
        self.lowest = next((i for i, ids in enumerate(self.held) if ids), len(self.held))
        self.tied = tuple(rest.index(i) if i in rest else -1 for i in start)
        self.own = tuple(k for k, i in enumerate(rest) if i not in start)
        if [*start, *(i for ids in inner for i in ids), *(rest[k] for k in self.own)] != list(range(len(params))):
            raise ValueError("params do not stand in the model's order")

    def of(self, params: Sequence[Parameter]) -> list[list[Parameter]]:
        """The parameters that are ``held``."""
        return [[params[i] for i in ids] for ids in self.held]


def joined(start: tuple, rest: tuple, tied: tuple[int, ...], own: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Gradients of the embedding, and of the rest without those of a tied head, which are in the embedding's then."""
    first: tuple[Tensor, ...] = ()
    for k in range(len(start)):
        first = first + (start[k] + rest[tied[k]] if tied[k] >= 0 else start[k],)
    last: tuple[Tensor, ...] = ()
    for k in own:
        last = last + (rest[k],)
    return first, last


def held(params: Sequence[Parameter], *cells: nn.Cell) -> list[int]:
    """Places in ``params`` of those that the cells hold."""
    ids = {id(parameter) for cell in cells for parameter in cell.get_parameters()}
    return [i for i, parameter in enumerate(params) if id(parameter) in ids]


class Halves(Graph):
    """Layers, one after another: (x [t, h], rotary tables …, mask, rows [c] or none) -> the outputs of all halves ….

    Args:
        halves: ``Attend`` and ``Feed`` in turn. The last layer goes on with ``rows`` alone, where they are given.
    """

    def __init__(self, halves: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.halves = nn.CellList(list(halves), auto_prefix=False)

    def construct(self, x, cos_q, sin_q, cos_k, sin_k, bias, rows=None) -> tuple[Tensor, ...]:
        count = len(self.halves)
        found: tuple[Tensor, ...] = ()
        for i in range(count):
            if i % 2:
                x = self.halves[i](x)
            else:
                x = self.halves[i](x, cos_q, sin_q, cos_k, sin_k, bias, rows if i == count - 2 else None)
            found = found + (x,)
        return found


class HalvesGradients(nn.Cell):
    """Of ``Halves``: (d output, rotary tables …, mask, rows or none, the inputs of all halves …) -> (d of the lowest
    one's input, a gradient [n] for each half whose parameters train …).

    Args:
        weights: of each half, the parameters that train.
        again: of each half, whether it is computed again once the gradient of its output is there, but for its last
            projection, whose output nothing needs: only its input is kept then. Of the others the compiler sees the
            same work twice, and keeps what it has.
        lowest: the first half that needs a gradient.
    """

    def __init__(
        self, halves: Sequence[nn.Cell], weights: Sequence[Sequence[Parameter]], again: Sequence[bool], lowest: int = 0
    ):
        super().__init__(auto_prefix=False)
        self.halves = nn.CellList([Backward(*pair) for pair in zip(halves, weights, strict=True)], auto_prefix=False)
        self.again, self.lowest = tuple(again), lowest
        self.vectors = sum(len(own) > 0 for own in weights)

    def construct(self, grad, cos_q, sin_q, cos_k, sin_k, bias, rows, *inputs) -> tuple[Tensor, ...]:
        count = len(self.halves)
        found: tuple[Tensor, ...] = ()
        for j in range(count - self.lowest):
            i = count - 1 - j
            x = ops.depend(inputs[i], grad) if self.again[i] else inputs[i]
            if i % 2:
                grads = self.halves[i](x, grad)
            elif i == count - 2 and rows is not None:
                grads = self.halves[i](x, cos_q, sin_q, cos_k, sin_k, bias, rows, grad)
            else:
                grads = self.halves[i](x, cos_q, sin_q, cos_k, sin_k, bias, grad)
            grad, found = grads[0], grads[1:] + found
        return (grad,) + found


class Backward(nn.Cell):
    """A half computed again, and its gradients: (its inputs, d output) -> (d x, those of ``weights`` [n], if any)."""

    def __init__(self, half: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.half, self.weights, self.trains = half, ms.ParameterTuple(list(weights)), len(weights) > 0
        self.flatten = Flatten()
        self.of_both = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        self.of_input = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs) -> tuple[Tensor, ...]:
        if self.trains:
            grads, own = self.of_both(self.half, self.weights)(*inputs)
            return grads[0], self.flatten(own)
        return (self.of_input(self.half)(*inputs)[0],)


class FinishGradients(nn.Cell):
    """(The last layer's output [c, h], targets [c]) -> (loss [], d x, gradients of ``weights`` …)."""

    def __init__(self, loss: nn.Cell, loss_scale: Parameter, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.trains = len(weights) > 0
        trained = ms.ParameterTuple(list(weights)) if weights else None
        self.grad_fn = ops.value_and_grad(_Finish(loss, loss_scale), 0, trained, has_aux=True)

    def construct(self, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if self.trains:
            (_, loss), (grad, own) = self.grad_fn(x, targets)
            return (loss, grad) + own
        (_, loss), grad = self.grad_fn(x, targets)
        return loss, grad


class Embed(nn.Cell):
    """ids [b, s] -> [t, h]."""

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(input_ids.reshape((-1,))).astype(self.decoder.stream)


class Start(nn.Cell):
    """What comes before the layers: ids, positions [b, s] -> (x [t, h], rotary tables …, mask)."""

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.decoder, self.embed = decoder, Embed(decoder)

    def construct(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        tables = self.decoder.rotary_tables(position_ids.reshape((-1,)))
        return (self.embed(input_ids),) + tables + (self.decoder.visibility(position_ids),)


class EmbeddingGradients(nn.Cell):
    """(ids [b, s], d of the first layer's input [t, h]) -> the gradients of ``weights``, in the embedding."""

    def __init__(self, decoder: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.embed, self.weights = Embed(decoder), ms.ParameterTuple(list(weights))
        self.of_weights = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, input_ids: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return self.of_weights(self.embed, self.weights)(input_ids, grad)


class UpperGradients(Graph):
    """The upper layers, norm, head and loss, and their gradients, in one graph.

    (x [t, h], rotary tables …, mask, rows [c], targets [c]) -> (loss [], d x, a gradient [n] for each half whose
    parameters train …, the gradients of ``rest`` …).

    Args:
        loss: ``SummedLoss``.
        loss_scale: [], what the loss is multiplied by before it is differentiated.
        halves, weights, again, lowest: as ``HalvesGradients`` takes them.
        rest: the parameters of norm and head that train.
    """

    def __init__(
        self,
        loss: nn.Cell,
        loss_scale: Parameter,
        halves: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        rest: Sequence[Parameter],
        again: Sequence[bool],
        lowest: int = 0,
    ):
        super().__init__(auto_prefix=False)
        self.forward, self.backward = Halves(halves), HalvesGradients(halves, weights, again, lowest)
        self.finish = FinishGradients(loss, loss_scale, rest)
        self.vectors = self.backward.vectors

    def construct(self, x, cos_q, sin_q, cos_k, sin_k, bias, rows, targets) -> tuple[Tensor, ...]:
        outputs = self.forward(x, cos_q, sin_q, cos_k, sin_k, bias, rows)
        finished = self.finish(outputs[-1], targets)
        inputs = (x,) + outputs[:-1]
        found = self.backward(finished[1], cos_q, sin_q, cos_k, sin_k, bias, rows, *inputs)
        return (finished[0],) + found + finished[2:]


class LayerGradients(nn.Cell):
    """Loss [] of a micro-batch, and the gradient [n] of the scaled loss to all ``params``; in one graph.

    The layers in ``layers``, indices from 0, are computed again. Dropout meets the same zeros: it draws from a table
    that does not change within a step.
    """

    def __init__(self, loss: nn.Cell, params: Sequence[Parameter], loss_scale: Parameter, layers: Sequence[int]):
        super().__init__(auto_prefix=False)
        parts = Parts(loss.model, params)
        first, *weights, rest = parts.of(params)
        again = [i // 2 in layers for i in range(len(parts.halves))]
        lowest = max(parts.lowest - 1, 0)
        self.upper = UpperGradients(loss, loss_scale, parts.halves, weights, rest, again, lowest)
        self.start, self.embedding = Start(loss.model.model), EmbeddingGradients(loss.model.model, first)
        self.lowest, self.tied, self.own = parts.lowest, parts.tied, parts.own
        self.flatten = Flatten()

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        started = self.start(input_ids, position_ids)
        upper = self.upper(*started, target_index, targets)
        found, rest = upper[2 : 2 + self.upper.vectors], upper[2 + self.upper.vectors :]
        start = self.embedding(input_ids, upper[1]) if self.lowest == 0 else ()
        first, last = joined(start, rest, self.tied, self.own)
        return upper[0], self.flatten(first + found + last)


def recomputed_layers(recompute: bool | int | Sequence[int], count: int) -> list[int]:
    """Indices of the layers that ``recompute`` names, of ``count``: all or none, the first N, or these ones.

    Raises:
        LoraMsError: there is no such layer.
    """
    if isinstance(recompute, bool):
        return list(range(count)) if recompute else []
    chosen = list(range(recompute)) if isinstance(recompute, int) else sorted({*recompute})
    if chosen and max(chosen) >= count:
        raise LoraMsError(f"recompute_config.recompute {recompute}: the model has {count} layers, counted from 0")
    return chosen
