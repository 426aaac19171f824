"""The parts of a decoder, forward and backward, which ``gradient.py`` puts together.

In the order of computation: the embedding; for each layer two half-layers, attention and feed-forward, each behind a
norm and beside a residual; the finish, which is the last norm, the head and the loss.

Shapes: b lines of s tokens; t = b * s; c label slots; h hidden size. Beside x all layers take ``rope``, the rotary
tables of queries and keys, and each takes its own of ``visible``, what a query may see, which a sliding window limits:
layers with and without a window can share a graph. ``rows`` [c] are the tokens that have a label: the last layer goes
on with these alone once its attention has seen all.
"""

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.errors import LoraMsError
from lora_ms.nn.graph import Graph
from lora_ms.nn.loss import summed_cross_entropy, token_log_probs
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.train.optimizer import Flatten

CHUNK_NUMBERS = 1 << 24  # logits held at once in the loss: 64 MB in float32

ROTARY_TABLES = 5  # of ``Decoder.rope``


def check_float32(trained: Iterable[Parameter]) -> None:
    """Raises LoraMsError where one of the parameters is narrower than its gradient, which the loss's scale may take out
    of float16; a narrow head has none (``DenseProjection.whole_weight``)."""
    if any(parameter.dtype != ms.float32 for parameter in trained):
        raise LoraMsError("all parameters train in float32 only: set compute_dtype to float32, or give pet_config")


class Finish(nn.Cell):
    """Norm, head and loss: the last layer's output [c, h], targets [c], further arrays … -> as ``SummedLoss``, whose
    arguments these are. It keeps the norm and the head that ``model`` has when it is made."""

    def __init__(
        self, model: nn.Cell, vocab_size: int, shard: Shard, terms: Sequence[nn.Cell], comparison: nn.Cell | None
    ):
        super().__init__(auto_prefix=False)
        self.outputs = model.outputs()
        self.terms = nn.CellList(list(terms))
        self.has_terms = len(terms) > 0
        self.compares = comparison is not None
        self.comparison: nn.Cell = nn.Identity() if comparison is None else comparison
        self.log_probs = token_log_probs(vocab_size, CHUNK_NUMBERS, model.operators)
        self.ends = tuple(sum(term.count for term in terms[: i + 1]) for i in range(len(terms)))
        self.starts = (0,) + self.ends[:-1]
        self.extra_inputs = self.ends[-1] if terms else 0
        if comparison is not None:
            self.extra_inputs = comparison.count
        # numbers in the result, where it is several, whose sum is the loss; 0: the result is the loss
        self.summed = 1 if self.compares else (1 + len(terms)) * self.has_terms
        self.cross_entropy = summed_cross_entropy(vocab_size, CHUNK_NUMBERS, model.operators, shard)

    def states(self, x: Tensor) -> Tensor:
        """From the last layer's output [c, h], the normalised hidden states."""
        return self.outputs.norm(x)

    def counts(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the last layer's output [c, h]; returns what ``SummedCrossEntropy`` returns."""
        return self.cross_entropy(self.states(x), self.outputs.head_weight(), targets)

    def label_log_probs(self, x: Tensor, targets: Tensor) -> Tensor:
        """From the last layer's output [c, h]: the log-probabilities of the targets [c] float32."""
        return self.log_probs(self.states(x), self.outputs.head_weight(), targets)[0]

    def construct(self, x: Tensor, targets: Tensor, *extras: Tensor) -> Tensor:
        return self.losses(self.states(x), targets, extras)

    def losses(self, hidden: Tensor, targets: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """From the normalised hidden states [c, h]."""
        head = self.outputs.head_weight()
        if self.compares:
            return self.comparison(self.log_probs(hidden, head, targets)[0], *extras)
        found = self.cross_entropy(hidden, head, targets)[0]
        if not self.has_terms:
            return found
        values: tuple[Tensor, ...] = (found,)
        wide = hidden.astype(ms.float32)
        for i in range(len(self.terms)):
            own = extras[self.starts[i] : self.ends[i]]
            values = values + (self.terms[i](wide, head, targets, *own),)
        return ops.stack(values)


class SummedLoss(nn.Cell):
    """Summed cross-entropy of a batch's label tokens; head and logits are computed for these alone.

    input_ids, position_ids [b, s], target_index [c], targets [c] -> [] float32.

    Args:
        terms: further terms of the loss, each (hidden [c, h] float32, head [v, h], targets [c], its ``count`` arrays …)
            -> [] float32. With terms the inputs end with the arrays of all of them, and the result is [1 + terms]: the
            loss is its sum.
        comparison: takes the place of the cross-entropy, and has no further terms beside it: (log-probabilities of the
            targets [c] float32, its ``count`` arrays …) -> [1 + its SUMS], of which the first is the loss.
    """

    def __init__(
        self,
        model: nn.Cell,
        vocab_size: int,
        shard: Shard = WHOLE,
        terms: Sequence[nn.Cell] = (),
        comparison: nn.Cell | None = None,
    ):
        super().__init__()
        self.model = model
        self.finish = Finish(model, vocab_size, shard, terms, comparison)
        self.summed = self.finish.summed

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, target_index: Tensor, targets: Tensor, *extras: Tensor
    ) -> Tensor:
        hidden = self.model.hidden_states(input_ids, position_ids, target_index)  # [c, h]
        return self.finish.losses(hidden, targets, extras)


# --- forward


class LayerInputs(Graph):
    """What the layers take: ids, positions [b, s] -> (x [t, h], rope …, what a query sees through each window …).

    It keeps the embedding that ``decoder`` has when it is made.
    """

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.inputs = decoder.alone()

    def construct(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        positions = position_ids.reshape((-1,))
        x = self.inputs.embed(input_ids, positions >= 0)
        return (x,) + self.inputs.rope(positions) + self.inputs.visibility(position_ids)

    def by_layer(self, found: tuple[Tensor, ...]) -> tuple[Tensor, tuple, tuple]:
        """What ``construct`` returned, as x, rope and visible of each layer."""
        return found[0], found[1 : 1 + ROTARY_TABLES], self.inputs.of_layers(found[1 + ROTARY_TABLES :])


class AttentionHalf(nn.Cell):
    """The first half of a layer: (x [t, h], rope, visible, rows or none) -> [t, h] or [c, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer
        # tensors that a gradient needs besides x: queries, keys, values, what the attention mixed, and its own
        self.kept = 4 + layer.self_attn.attention.KEPT

    def keeping(self, x: Tensor, rope: tuple, visible: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """The output, and what a gradient needs …."""
        q, k, v = self.layer.project(x)
        mixed = self.layer.self_attn.mix_keeping(q, k, v, rope, visible)
        return (self.layer.join(x, mixed[0], rows), q, k, v) + mixed

    def construct(self, x: Tensor, rope: tuple, visible: Tensor, rows: Tensor | None) -> Tensor:
        return self.layer.attend(x, rope, visible, rows)

    def backward(self, weights: Sequence[Parameter]) -> nn.Cell:
        return AttentionBackward(self.layer, weights)


class FeedForwardHalf(nn.Cell):
    """The second half of a layer: x [t, h] -> [t, h]; called as ``AttentionHalf`` is."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.kept = 2  # gate and up

    def keeping(self, x: Tensor, rope: tuple, visible: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """The output, and what a gradient needs …."""
        gate, up = self.layer.expand(x)
        return self.layer.contract(x, gate, up), gate, up

    def construct(self, x: Tensor, rope: tuple, visible: Tensor, rows: Tensor | None) -> Tensor:
        return self.layer.feed(x)

    def backward(self, weights: Sequence[Parameter]) -> nn.Cell:
        return FeedForwardBackward(self.layer, weights)


class HalfLayers(nn.Cell):
    """Layers, one after another: (x [t, h], rope, visible of each layer, rows or none) -> of each half-layer what is
    kept of it …, and its output.

    Args:
        recomputed: of each half-layer, whether nothing is kept of it.
    """

    def __init__(self, half_layers: Sequence[nn.Cell], recomputed: Sequence[bool]):
        super().__init__(auto_prefix=False)
        self.half_layers = nn.CellList(list(half_layers), auto_prefix=False)
        self.recomputed = tuple(recomputed)

    def construct(self, x: Tensor, rope: tuple, visible: tuple, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        count = len(self.half_layers)
        outputs: tuple[Tensor, ...] = ()
        for i in range(count):
            own_rows = rows if i == count - 2 else None  # the last layer's attention leaves out the others
            if self.recomputed[i]:
                x = self.half_layers[i](x, rope, visible[i // 2], own_rows)
                outputs = outputs + (x,)
            else:
                found = self.half_layers[i].keeping(x, rope, visible[i // 2], own_rows)
                x = found[0]
                outputs = outputs + found[1:] + (x,)
        return outputs


# --- backward


class ScaledLoss(nn.Cell):
    """The loss that ``part`` computes: multiplied by the loss scale, to be differentiated, and as it is.

    part: with ``summed``, how many numbers of its result the loss is the sum of; 0: the result is the loss.
    """

    def __init__(self, part: nn.Cell, loss_scale: Parameter):
        super().__init__(auto_prefix=False)
        self.part = part
        self.summed = part.summed
        self.loss_scale = loss_scale

    def construct(self, *inputs) -> tuple[Tensor, Tensor]:
        loss = self.part(*inputs)
        total = loss[: self.summed].sum() if self.summed > 0 else loss
        return total * self.loss_scale.astype(ms.float32), loss


class LossGradients(nn.Cell):
    """The gradient of a part that ends in the loss: its inputs … -> (loss, gradients …), all activations kept.

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


class Project(nn.Cell):
    """x [t, h] -> queries, keys and values of a layer."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.project(x)


class Attend(nn.Cell):
    """Queries, keys and values, rope …, visible, and what ``Attention.mix_keeping`` gave … -> the first of these."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.attention = layer.self_attn

    def construct(self, q, k, v, *others) -> Tensor:
        rope, visibility = others[:ROTARY_TABLES], others[ROTARY_TABLES]
        return self.attention.mix_known(q, k, v, rope, visibility, others[ROTARY_TABLES + 1 :])


class Join(nn.Cell):
    """x [t, h], mixed [t, n_h * d], rows [c] or none -> [t, h] or [c, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor, mixed: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.layer.join(x, mixed, rows)


class Expand(nn.Cell):
    """x [t, h] -> a layer's gate and up."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.expand(x)


class Contract(nn.Cell):
    """x [t, h], gate, up -> [t, h]."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return self.layer.contract(x, gate, up)


class StepBackward(nn.Cell):
    """The gradients of one step of a layer: (inputs …, d outputs) -> (those of the inputs …), (those of the parameters
    among ``weights`` that ``cells`` hold …).

    The step is written as if it were computed again; the compiler leaves out what its gradients do not need, which is
    every product. (A method whose gradient needs a product's result, such as DoRA, has it computed again.)
    """

    def __init__(self, step: nn.Cell, cells: Sequence[nn.Cell], weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.step = step
        own = [weights[i] for i in indices_in(weights, *cells)]
        self.weights = ms.ParameterTuple(own)
        self.trains = len(own) > 0
        self.of_both = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        self.of_inputs = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self.trains:
            return self.of_both(self.step, self.weights)(*inputs)
        return self.of_inputs(self.step)(*inputs), ()


class AttentionBackward(nn.Cell):
    """Of ``AttentionHalf``: (x and what is kept, rope, visible, rows or none, d output) -> (d x, the gradient of
    ``weights`` [n], if there are any)."""

    def __init__(self, layer: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        attention = layer.self_attn
        inner = [layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj]
        self.project = StepBackward(Project(layer), inner, weights)
        self.join = StepBackward(Join(layer), [attention.o_proj], weights)
        self.mix = StepBackward(Attend(layer), attention.inner(), weights)
        self.trains = len(weights) > 0
        self.flatten = Flatten()

    def construct(self, kept: tuple, rope: tuple, visible: Tensor, rows: Tensor | None, grad: Tensor) -> tuple:
        x, kept = kept[0], kept[1:]
        mixed = kept[3]
        if rows is None:
            joined, d_output = self.join(x, mixed, grad)
        else:
            joined, d_output = self.join(x, mixed, rows, grad)
        d_inner, d_mixed = self.mix(*kept[:3], *rope, visible, *kept[3:], joined[1])
        projected, d_projections = self.project(x, d_inner[:3])
        d_x = joined[0] + projected[0]
        if self.trains:
            return d_x, self.flatten(d_projections + d_output + d_mixed)  # the model's order
        return (d_x,)


class FeedForwardBackward(nn.Cell):
    """Of ``FeedForwardHalf``, as ``AttentionBackward``."""

    def __init__(self, layer: nn.Cell, weights: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        mlp = layer.mlp
        inner = [layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj]
        self.expand = StepBackward(Expand(layer), inner, weights)
        self.contract = StepBackward(Contract(layer), [mlp.down_proj], weights)
        self.trains = len(weights) > 0
        self.flatten = Flatten()

    def construct(self, kept: tuple, rope: tuple, visible: Tensor, rows: Tensor | None, grad: Tensor) -> tuple:
        x, kept = kept[0], kept[1:]
        gate, up = kept
        contracted, d_down = self.contract(x, gate, up, grad)
        expanded, d_inner = self.expand(x, contracted[1:])
        d_x = contracted[0] + expanded[0]
        if self.trains:
            return d_x, self.flatten(d_inner + d_down)
        return (d_x,)


class HalfLayersBackward(nn.Cell):
    """Of ``HalfLayers``: (d output, rope, visible of each layer, rows or none, of each half-layer its input and what is
    kept …) -> (d of the lowest one's input, a gradient [n] for each half-layer that trains …).

    Args:
        weights: of each half-layer, the parameters that train.
        recomputed: of each half-layer, whether what it needs is computed here again, from its input.
        lowest: index of the first half-layer that needs a gradient.

    Of a recomputed half-layer, ``ops.depend`` ties the input to the gradient of the output, so that the compiler
    neither recognises the work of the forward pass, whose activations it would keep instead, nor starts before that
    gradient is there.
    """

    def __init__(
        self,
        half_layers: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        recomputed: Sequence[bool],
        lowest: int = 0,
    ):
        super().__init__(auto_prefix=False)
        self.half_layers = nn.CellList(list(half_layers), auto_prefix=False)
        parts = [half.backward(own) for half, own in zip(half_layers, weights, strict=True)]
        self.parts = nn.CellList(parts, auto_prefix=False)
        self.recomputed = tuple(recomputed)
        self.lowest = lowest
        counts = kept_counts(half_layers, recomputed)
        self.ends = tuple(sum(1 + count for count in counts[: i + 1]) for i in range(len(counts)))
        self.starts = (0,) + self.ends[:-1]

    def construct(
        self, grad: Tensor, rope: tuple, visible: tuple, rows: Tensor | None, kept: tuple
    ) -> tuple[Tensor, ...]:
        count = len(self.parts)
        found: tuple[Tensor, ...] = ()
        for j in range(count - self.lowest):
            i = count - 1 - j
            own = kept[self.starts[i] : self.ends[i]]
            own_rows = rows if i == count - 2 else None
            if self.recomputed[i]:
                x = ops.depend(own[0], grad)
                own = (x,) + self.half_layers[i].keeping(x, rope, visible[i // 2], own_rows)[1:]
            gradients = self.parts[i](own, rope, visible[i // 2], own_rows, grad)
            grad = gradients[0]
            found = gradients[1:] + found
        return (grad,) + found


def kept_counts(half_layers: Sequence[nn.Cell], recomputed: Sequence[bool]) -> list[int]:
    """For each half-layer, how many tensors ``HalfLayers`` keeps besides its input."""
    return [0 if again else half.kept for half, again in zip(half_layers, recomputed, strict=True)]


class TopGradients(Graph):
    """The upper layers and the finish, and their gradients, in one graph.

    (x [t, h], rope …, visible of each layer …, rows [c], targets [c], further arrays …) -> (loss, d x, a gradient [n]
    for each half-layer that trains …, the gradients of the finish's ``weights`` …).

    Args:
        finish_weights: the parameters of the finish that train.
        half_layers, weights, recomputed, lowest: as ``HalfLayersBackward`` takes them.
    """

    title = "the training step"

    def __init__(
        self,
        finish: Finish,
        loss_scale: Parameter,
        finish_weights: Sequence[Parameter],
        half_layers: Sequence[nn.Cell],
        weights: Sequence[Sequence[Parameter]],
        recomputed: Sequence[bool],
        lowest: int,
    ):
        super().__init__(auto_prefix=False)
        self.forward = HalfLayers(half_layers, recomputed)
        self.backward = HalfLayersBackward(half_layers, weights, recomputed, lowest)
        self.finish = LossGradients(finish, loss_scale, finish_weights, of_input=True)
        self.tail = 2 + finish.extra_inputs  # inputs from rows on

    def construct(self, x: Tensor, *others) -> tuple[Tensor, ...]:
        rope, visible = others[:ROTARY_TABLES], others[ROTARY_TABLES : -self.tail]
        last = others[-self.tail :]
        rows = last[0]
        outputs = self.forward(x, rope, visible, rows)
        finished = self.finish(outputs[-1], *last[1:])
        found = self.backward(finished[1], rope, visible, rows, (x,) + outputs[:-1])
        return (finished[0],) + found + finished[2:]


class Embed(nn.Cell):
    """ids [b, s] -> [t, h], that of padding too."""

    def __init__(self, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.embed_tokens = decoder.embed_tokens
        self.stream = decoder.stream

    def construct(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids.reshape((-1,))).astype(self.stream)


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
        LoraMsError: a layer and the embedding share some of them.
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
        if within & {*embedding}:
            raise LoraMsError(
                "parameters that all layers share, such as those of prefix_projection, train in a model of fewer than "
                "16 layers whose layers are not all recomputed: leave them out (prefix_projection: False)"
            )
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
