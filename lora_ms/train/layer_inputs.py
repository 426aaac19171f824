"""What the projections of a model take at the label tokens of some rows: for starts of adapters that look at data."""

from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms.data.example import Batch
from lora_ms.data.loader import DataPlan
from lora_ms.nn.graph import Graph
from lora_ms.train.parts import ROTARY_TABLES, HalfLayers, LayerInputs, ModelParts
from lora_ms.train.shared_layers import SharedLayers

Array = NDArray[np.float32]
MIXED, GATE = 3, 0  # places of what ``AttentionHalf`` and ``FeedForwardHalf`` keep


class _TopKept(Graph):
    """(x [t, h], rope …, visible of each layer …) -> of each half-layer what is kept of it …, and its output."""

    def __init__(self, half_layers: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.half_layers = HalfLayers(half_layers, [False] * len(half_layers))

    def construct(self, x: Tensor, *others) -> tuple[Tensor, ...]:
        return self.half_layers(x, others[:ROTARY_TABLES], others[ROTARY_TABLES:])


def _seen(batch: Batch, lengths: Sequence[int]) -> NDArray[np.int64]:
    """Flat positions of the label tokens that the model reads: of each row all but the last. lengths: label tokens of
    each row, in the order of the slots."""
    ends = np.cumsum(lengths)
    last = np.zeros(ends[-1], bool)
    last[ends - 1] = True
    return batch.target_index[: ends[-1]][~last].astype(np.int64) + 1


def _normalised(x: Array, norm: nn.Cell) -> Array:
    scale = np.sqrt(np.mean(np.square(x), 1, keepdims=True) + norm.eps)
    return x / scale * norm.weight.asnumpy().astype(np.float32)


def layer_inputs(model: nn.Cell, plan: DataPlan) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Paths and inputs [tokens, in] of all projections of the bare ``model``, layer after layer, those together that
    take the same; the model is left as ``set_train(False)``.

    plan: one pass over the rows.
    """
    model.set_train(False)
    parts = ModelParts(model)
    shared = SharedLayers(parts, [False] * len(parts.half_layers))
    prepare = LayerInputs(model.model)
    seen: list[NDArray[np.int64]] = []
    states = []
    for step in range(plan.steps_per_epoch):
        for rows, batch in plan.placed(step):
            seen.append(_seen(batch, plan.label_counts[rows].tolist()))
            states.append(prepare.by_layer(prepare(*map(Tensor, batch[:2]))))
    top = _TopKept(parts.half_layers[shared.top :])
    with shared.sharing():
        for number, block in enumerate([*shared.blocks, None]):
            first = shared.size // 2 * number
            layers = parts.half_layers[2 * first : 2 * first + (shared.size if block else len(parts.half_layers))]
            found: list[list[tuple[Array, ...]]] = [[] for _ in layers[::2]]
            for i, (x, rope, visible) in enumerate(states):
                if block is None:
                    outputs = top(x, *rope, *visible[first:])
                else:
                    outputs = block.forward(x, rope, visible)
                at = seen[i]
                for layer, (attention, feed) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
                    kept, outputs = outputs[: attention.kept + 1], outputs[attention.kept + 1 :]
                    more, outputs = outputs[: feed.kept + 1], outputs[feed.kept + 1 :]
                    taken = (x, kept[MIXED], kept[-1], more[GATE], more[GATE + 1])
                    found[layer].append(tuple(one.asnumpy().astype(np.float32)[at] for one in taken))
                    x = more[-1]
                states[i] = (x, rope, visible)
            for layer, parts_of in enumerate(found):
                yield from _by_name(model, first + layer, parts_of)


def _by_name(model: nn.Cell, number: int, batches: list[tuple[Array, ...]]) -> Iterator[tuple[tuple[str, ...], Array]]:
    layer = model.model.layers[number]
    x, mixed, between, gate, up = (np.concatenate(part) for part in zip(*batches, strict=True))
    path = f"model.layers.{number}"
    before = _normalised(x, layer.input_layernorm)
    yield tuple(f"{path}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")), before
    yield (f"{path}.self_attn.o_proj",), mixed
    inner = _normalised(between, layer.post_attention_layernorm)
    yield tuple(f"{path}.mlp.{name}" for name in ("gate_proj", "up_proj")), inner
    yield (f"{path}.mlp.down_proj",), gate / (1 + np.exp(-gate)) * up
