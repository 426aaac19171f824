"""The gradient of a micro-batch layer by layer, activations computed again: less memory, more time.

``Cell.recompute`` is not used: MindSpore takes a gradient that a cell writes out by hand (``bprop``) for a part of
the forward pass, so that nearly all activations would be kept.
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.errors import LoraMsError


class _Finish(nn.Cell):
    """Norm, head and loss: the last layer's output [c, h] -> (scaled loss [], loss [])."""

    def __init__(self, loss: nn.Cell, loss_scale: Parameter):
        super().__init__(auto_prefix=False)
        self.loss, self.loss_scale = loss, loss_scale

    def construct(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.loss.model.model.norm(x).astype(self.loss.model.dtype)
        loss = self.loss.cross_entropy(hidden, self.loss.model.head_weight(), targets)[0]
        return loss * self.loss_scale.astype(ms.float32), loss


class LayerGradients(nn.Cell):
    """Loss [] of a micro-batch, and the gradients of ``params`` of the scaled loss, in their order.

    Of each layer in ``layers`` only the input is kept; the layer is computed again once the gradient of its output is
    there. Of the others the compiler sees the same work twice, and keeps what it has. Dropout meets the same zeros: it
    draws from a table that does not change within a step.

    Args:
        loss: ``SummedLoss``.
        params: the trainable parameters.
        loss_scale: [], what the loss is multiplied by before it is differentiated.
        layers: indices from 0.
    """

    def __init__(self, loss: nn.Cell, params: Sequence[Parameter], loss_scale: Parameter, layers: Sequence[int]):
        super().__init__(auto_prefix=False)
        self.finish = _Finish(loss, loss_scale)
        self.decoder = loss.model.model
        cells = list(self.decoder.layers)
        self.again = tuple(i in layers for i in range(len(cells)))
        start, *inner = (held(cell, params) for cell in (self.decoder.embed_tokens, *cells))
        below = {i for ids in inner for i in ids} | {*start} - {*held(loss.model.lm_head, params)}
        last = [i for i in range(len(params)) if i not in below]
        # nothing below the lowest trainable layer needs a gradient
        self.lowest = next((i for i, ids in enumerate((start, *inner)) if ids), len(cells) + 1)
        parts = (start, *inner, last)
        self.weights = tuple(ms.ParameterTuple([params[i] for i in ids]) for ids in parts)
        # where each parameter's gradients stand among those of all parts; a tied head has two
        found = [i for ids in parts for i in ids]
        self.places = tuple(tuple(k for k, i in enumerate(found) if i == j) for j in range(len(params)))
        self.of_both = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        self.of_input = ops.GradOperation(get_all=True, sens_param=True)
        self.of_weights = ops.GradOperation(get_by_list=True, sens_param=True)
        self.of_finish = ops.value_and_grad(self.finish, 0, self.weights[-1] if last else None, has_aux=True)
        self.trains_head = bool(last)

    def backward(self, i: int, x: Tensor, rope: tuple, bias: Tensor, rows: Tensor, grad: Tensor) -> tuple:
        """Gradients of layer i's input and of its parameters."""
        layer, weights = self.decoder.layers[i], self.weights[i + 1]
        inputs = (x, rope, bias, rows, grad) if i == len(self.again) - 1 else (x, rope, bias, grad)
        if len(weights) > 0:
            grads, own = self.of_both(layer, weights)(*inputs)
            return grads[0], own
        return self.of_input(layer)(*inputs)[0], ()

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor
    ) -> tuple[Tensor, tuple]:
        decoder, count = self.decoder, len(self.again)
        rope, bias = decoder.rotary_tables(position_ids.reshape((-1,))), decoder.row_mask(position_ids)
        flat_ids = input_ids.reshape((-1,))
        embedded = decoder.embed_tokens(flat_ids)
        x = embedded.astype(decoder.stream)
        inputs = []
        for i in range(count):
            inputs.append(x)
            x = decoder.layers[i](x, rope, bias, target_index) if i == count - 1 else decoder.layers[i](x, rope, bias)
        found: tuple[Tensor, ...] = ()
        if self.trains_head:
            (_, loss), (grad, found) = self.of_finish(x, targets)
        else:
            (_, loss), grad = self.of_finish(x, targets)
        for j in range(count - max(self.lowest - 1, 0)):
            i = count - 1 - j
            x = ops.depend(inputs[i], grad) if self.again[i] else inputs[i]
            grad, own = self.backward(i, x, rope, bias, target_index, grad)
            found = own + found
        if self.lowest == 0:
            found = (
                self.of_weights(decoder.embed_tokens, self.weights[0])(flat_ids, grad.astype(embedded.dtype)) + found
            )
        return loss, tuple([ops.addn([found[k] for k in places]) for places in self.places])


def held(cell: nn.Cell, params: Sequence[Parameter]) -> list[int]:
    """Places in ``params`` of those that ``cell`` holds."""
    ids = {id(parameter) for parameter in cell.get_parameters()}
    return [i for i, parameter in enumerate(params) if id(parameter) in ids]


def recomputed_layers(recompute: bool | int | Sequence[int], count: int) -> list[int]:
    """Indices of the layers that ``recompute`` names, of ``count``: all or none, the first N, or these ones.

    Raises:
        LoraMsError: there is no such layer.
    """
    if isinstance(recompute, bool):
        return list(range(count)) if recompute else []
    chosen = list(range(recompute)) if isinstance(recompute, int) else list(recompute)
    if chosen and max(chosen) >= count:
        raise LoraMsError(f"recompute_config.recompute {recompute}: the model has {count} layers, counted from 0")
    return chosen
