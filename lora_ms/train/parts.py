"""The parts of a decoder, forward and backward, which ``gradient.py`` puts together.

In the order of computation: the embedding; for each layer two half-layers, attention and feed-forward, each behind a
norm and beside a residual; the finish, which is the last norm, the head and the loss.

Shapes: b lines of s tokens; t = b * s; c label slots; h hidden size. ``context`` is what all layers take beside x: the
rotary tables of queries and keys, and what each query may see. ``rows`` [c] are the tokens that have a label: the last
layer goes on with these alone once its attention has seen all.
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.nn.graph import Graph
from lora_ms.nn.loss import summed_cross_entropy
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.train.optimizer import Flatten

CHUNK_NUMBERS = 1 << 24  # logits held at once in the loss: 64 MB in float32


class SummedLoss(nn.Cell):
    """Summed cross-entropy of a batch's label tokens; head and logits are computed for these alone.

    input_ids, position_ids [b, s], target_index [c], targets [c] -> [] float32.
    """

    def __init__(self, model: nn.Cell, vocab_size: int, shard: Shard = WHOLE):
        super().__init__()
        self.model = model
        self.cross_entropy = summed_cross_entropy(vocab_size, CHUNK_NUMBERS, model.operators, shard)

    def of_output(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the last layer's output [c, h]; returns what ``SummedCrossEntropy`` returns."""
        hidden = self.model.model.norm(x)
        return self.cross_entropy(hidden, self.model.head_weight(), targets)

    def construct(self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids, position_ids, target_index)  # [c, h]
        return self.cross_entropy(hidden, self.model.head_weight(), targets)[0]


# --- forward


class Embed(nn.Cell):
    """ids [b, s] -> [t, h]."""

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(input_ids.reshape((-1,))).astype(self.decoder.stream)


class LayerInputs(Graph):
    """What the first layer takes: ids, positions [b, s] -> (x [t, h], context …)."""

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.embed = Embed(decoder)

    def construct(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        tables = self.decoder.rotary_tables(position_ids.reshape((-1,)))
        return (self.embed(input_ids),) + tables + (self.decoder.visibility(position_ids),)


class AttentionHalf(nn.Cell):
    """The first half of a layer: x [t, h], context, rows or none -> [t, h] or [c, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x, cos_q, sin_q, cos_k, sin_k, visibility, rows=None) -> Tensor:
        return self.layer.attend(x, (cos_q, sin_q, cos_k, sin_k), visibility, rows)


class FeedForwardHalf(nn.Cell):
    """The second half of a layer: x [t, h] -> [t, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor) -> Tensor:
        return self.layer.feed(x)


class HalfLayers(nn.Cell):
    """Layers, one after another: (x [t, h], context, rows or none) -> the outputs of all half-layers …."""

    def __init__(self, half_layers: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.half_layers = nn.CellList(list(half_layers), auto_prefix=False)

    def construct(self, x: Tensor, context: tuple, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        count = len(self.half_layers)
        outputs: tuple[Tensor, ...] = ()
        for i in range(count):
            if i % 2:
                x = self.half_layers[i](x)
            elif i == count - 2 and rows is not None:
                x = self.half_layers[i](x, *context, rows)
            else:
                x = self.half_layers[i](x, *context)
            outputs = outputs + (x,)
        return outputs


class Finish(nn.Cell):
    """Norm, head and loss: the last layer's output [c, h], targets [c] -> loss []."""

    def __init__(self, loss: SummedLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.loss.of_output(x, targets)[0]


# --- backward


class ScaledLoss(nn.Cell):
    """The loss that ``part`` computes: multiplied by the loss scale, to be differentiated, and as it is."""

    def __init__(self, part: nn.Cell, loss_scale: Parameter):
        super().__init__(auto_prefix=False)
        self.part = part
        self.loss_scale = loss_scale

    def construct(self, *inputs) -> tuple[Tensor, Tensor]:
        loss = self.part(*inputs)
        return loss * self.loss_scale.astype(ms.float32), loss


class LossGradients(nn.Cell):
    """The gradient of a part that ends in the loss: its inputs … -> (loss [], gradients …), all activations kept.

    The gradients are that of the first input, where ``of_input``, and those of ``weights``.
    """

    def __init__(self, part: nn.Cell, loss_scale: Parameter, weights: Sequence[Parameter], of_input: bool):
        super().__init__(auto_prefix=False)
        self.of_input = of_input
        self.of_weights = len(weights) > 0
        trained = ms.ParameterTuple(list(weights)) if weights else None
        self.gradient = ops.value_and_grad(ScaledLoss(part, loss_scale), 0 if of_input else None, trained, has_aux=True)

    def construct(self, *inputs) -> tuple[Tensor, ...]:
        values, gradients = self.gradient(*inputs)
        if self.of_input and self.of_weights:
            return (values[1], gradients[0]) + gradients[1]
        if self.of_input:
            return values[1], gradients
        return (values[1],) + gradients


class PartBackward(nn.Cell):
    """A part computed from its inputs, and its gradients: (inputs …, d output) -> (d of the first input, that of
    ``weights`` [n], if there are any)."""

    def __init__(self, part: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.part = part
        self.weights = ms.ParameterTuple(list(weights))
        self.trains = len(weights) > 0
        self.flatten = Flatten()
        self.of_inputs_and_weights = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        self.of_inputs = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs) -> tuple[Tensor, ...]:
        if self.trains:
            d_inputs, d_weights = self.of_inputs_and_weights(self.part, self.weights)(*inputs)
            return d_inputs[0], self.flatten(d_weights)
        return (self.of_inputs(self.part)(*inputs)[0],)


class HalfLayersBackward(nn.Cell):
    """Of ``HalfLayers``: (d output, context, rows or none, the inputs of all half-layers) -> (d of the lowest one's
    input, a gradient [n] for each half-layer that trains …).

    Args:
        weights: of each half-layer, the parameters that train.
        recomputed: of each half-layer, whether its activations are recomputed here.
        lowest: index of the first half-layer that needs a gradient.

    Every half-layer is written as if it were computed anew from its input. A recomputed one is: ``ops.depend`` ties its
    input to the gradient of its output, so that the compiler neither recognises the work of the forward pass, whose
    activations it would keep instead, nor starts before that gradient is there. Without ``ops.depend`` it recognises
    it, and nothing is computed twice. The last projection of a half-layer is never recomputed, as no gradient needs its
    output.
    """

    def __init__(
        self,
        half_layers: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        recomputed: Sequence[bool],
        lowest: int = 0,
    ):
        super().__init__(auto_prefix=False)
        parts = [PartBackward(*pair) for pair in zip(half_layers, weights, strict=True)]
        self.parts = nn.CellList(parts, auto_prefix=False)
        self.recomputed = tuple(recomputed)
        self.lowest = lowest

    def construct(self, grad: Tensor, context: tuple, rows: Tensor | None, inputs: tuple) -> tuple[Tensor, ...]:
        count = len(self.parts)
        found: tuple[Tensor, ...] = ()
        for j in range(count - self.lowest):
            i = count - 1 - j
            x = ops.depend(inputs[i], grad) if self.recomputed[i] else inputs[i]
            if i % 2:
                gradients = self.parts[i](x, grad)
            elif i == count - 2 and rows is not None:
                gradients = self.parts[i](x, *context, rows, grad)
            else:
                gradients = self.parts[i](x, *context, grad)
            grad = gradients[0]
            found = gradients[1:] + found
        return (grad,) + found


class TopGradients(Graph):
    """The upper layers and the finish, and their gradients, in one graph.

    (x [t, h], context …, rows [c], targets [c]) -> (loss [], d x, a gradient [n] for each half-layer that trains …,
    the gradients of the finish's ``weights`` …).

    Args:
        finish_weights: the parameters of the finish that train.
        half_layers, weights, recomputed, lowest: as ``HalfLayersBackward`` takes them.
    """

    def __init__(
        self,
        loss: SummedLoss,
        loss_scale: Parameter,
        finish_weights: Sequence[Parameter],
        half_layers: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        recomputed: Sequence[bool],
        lowest: int,
    ):
        super().__init__(auto_prefix=False)
        self.forward = HalfLayers(half_layers)
        self.backward = HalfLayersBackward(half_layers, weights, recomputed, lowest)
        self.finish = LossGradients(Finish(loss), loss_scale, finish_weights, of_input=True)

    def construct(self, x: Tensor, *others) -> tuple[Tensor, ...]:
        context, rows, targets = others[:-2], others[-2], others[-1]
        outputs = self.forward(x, context, rows)
        finished = self.finish(outputs[-1], targets)
        found = self.backward(finished[1], context, rows, (x,) + outputs[:-1])
        return (finished[0],) + found + finished[2:]


class EmbeddingGradients(Graph):
    """(ids [b, s], d of the first layer's input [t, h]) -> the gradients of ``weights``, in the embedding."""

    def __init__(self, decoder: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.embed = Embed(decoder)
        self.weights = ms.ParameterTuple(list(weights))
        self.of_weights = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, input_ids: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return self.of_weights(self.embed, self.weights)(input_ids, grad)


# --- who holds which parameter


def indices_in(params: Sequence[Parameter], *cells: nn.Cell) -> list[int]:
    """Indices in ``params`` of those that the cells hold."""
    held = {id(parameter) for cell in cells for parameter in cell.get_parameters()}
    return [i for i, parameter in enumerate(params) if id(parameter) in held]


class ModelParts:
    """A model's half-layers, and which of ``params`` each part of the model holds.

    Attributes:
        half_layers: ``AttentionHalf`` and ``FeedForwardHalf`` in turn.
        members: of each half-layer, the cells of the model that it consists of.
        weights: of each half-layer, its parameters among ``params``.
        embedding_weights, finish_weights: those of the two ends. A tied head is in both.
        lowest: the lowest part that has any: 0 the embedding, i + 1 half-layer i. Nothing below needs a gradient.
        ties: of each tied parameter, its index among the embedding's, and among the finish's as counted from their end.

    Raises:
        ValueError: ``params`` do not stand in the model's order.
    """

    def __init__(self, model: nn.Cell, params: Sequence[Parameter] = ()):
        self.half_layers: list[nn.Cell] = []
        self.members: list[tuple[nn.Cell, ...]] = []
        for layer in model.model.layers:
            self.half_layers += [AttentionHalf(layer), FeedForwardHalf(layer)]
            self.members += [(layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)]
        embedding = indices_in(params, model.model.embed_tokens)
        inner = [indices_in(params, *cells) for cells in self.members]
        within = {i for indices in inner for i in indices}
        tied = {*embedding} & {*indices_in(params, model.lm_head)}
        finish = [i for i in range(len(params)) if i not in within and (i not in embedding or i in tied)]
        in_order = [*embedding, *(i for indices in inner for i in indices), *(i for i in finish if i not in tied)]
        if in_order != list(range(len(params))):
            raise ValueError("params do not stand in the model's order")
        indices = [embedding, *inner, finish]
        self.lowest = next((part for part, found in enumerate(indices) if found), len(indices))
        self.embedding_weights, *self.weights, self.finish_weights = [[params[i] for i in part] for part in indices]
        self.ties = tuple(sorted((embedding.index(i), finish.index(i) - len(finish)) for i in tied))

    @property
    def trains_embedding(self) -> bool:
        return self.lowest == 0

    @property
    def lowest_half_layer(self) -> int:
        """Index of the lowest half-layer that needs a gradient."""
        return max(self.lowest - 1, 0)


def merge_tied(gradients: tuple, ties: tuple[tuple[int, int], ...]) -> tuple:
    """Replaces the two gradients of each tied parameter by their sum, in the first one's place.

    gradients: the embedding's …, those of the layers …, the finish's ….
    ties: indices of the two, as ``ModelParts.ties``.
    """
    for tie in ties:
        first, last = tie[0], len(gradients) + tie[1]
        total = gradients[first] + gradients[last]
        gradients = gradients[:first] + (total,) + gradients[first + 1 : last] + gradients[last + 1 :]
    return gradients
