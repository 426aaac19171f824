"""A model with a cache of keys and values, compiled for two lengths of input: a piece of a prompt, and one token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn import sharing
from lora_ms.nn.graph import Graph
from lora_ms.nn.kv_cache import KVCache
from lora_ms.nn.sharing import Place, kind_of, layers_in_blocks, parameters_of

BLOCK_LAYERS = 3  # a call of a graph takes some 0.7 ms of Python and MindSpore


class _Inputs(Graph):
    """ids [b, s], start [b], lengths [b] -> what the layers take …; see ``Decoder.cached_inputs``."""

    def __init__(self, model: nn.Cell, cache: KVCache):
        super().__init__(auto_prefix=False)
        self.decoder = model.model
        self.cache = cache

    def construct(self, input_ids: Tensor, start: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return self.decoder.cached_inputs(input_ids, self.cache, start, lengths)


class _Layers(nn.Cell):
    """Layers, one after another: x [b * s, h], what stands beside it … -> [b * s, h].

    windows: of each layer, the index of its window; first: the first one's number, in the cache.
    """

    def __init__(self, layers: Sequence[nn.Cell], windows: Sequence[int], cache: KVCache, first: int):
        super().__init__(auto_prefix=False)
        self.layers = nn.CellList(list(layers), auto_prefix=False)
        self.keys = ParameterTuple(cache.keys[first : first + len(layers)])
        self.values = ParameterTuple(cache.values[first : first + len(layers)])
        self.windows = tuple(windows)

    def construct(self, x: Tensor, context: tuple) -> Tensor:
        rope, rows = context[:4], context[4]
        for i in range(len(self.layers)):
            visible = context[5 + self.windows[i]]
            x = self.layers[i].cached(x, rope, visible, (self.keys[i], self.values[i], rows))
        return x


class _Block(Graph):
    """x [b * s, h], what stands beside it … -> [b * s, h]."""

    def __init__(self, layers: _Layers):
        super().__init__(auto_prefix=False)
        self.layers = layers

    def construct(self, x: Tensor, *context) -> Tensor:
        return self.layers(x, context)


class _Top(Graph):
    """x [b * s, h], what stands beside it …, rows [b] -> (logits [b, v] of the tokens ``rows``, likeliest ids [b])."""

    title = "generation"

    def __init__(self, model: nn.Cell, layers: _Layers):
        super().__init__(auto_prefix=False)
        self.model = model
        self.layers = layers
        self.argmax = ops.Argmax(-1, ms.int32)

    def construct(self, x: Tensor, *others) -> tuple[Tensor, Tensor]:
        logits = self.model.logits_of(self.layers(x, others[:-1]), others[-1])
        return logits, self.argmax(logits)


class _Whole(Graph):
    """All of it as one graph: for a few layers."""

    title = "generation"

    def __init__(self, inputs: _Inputs, top: _Top):
        super().__init__(auto_prefix=False)
        self.inputs = inputs
        self.top = top

    def construct(self, input_ids: Tensor, start: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.top(*self.inputs(input_ids, start, lengths), rows)


class CachedModel:
    """``model`` (a ``CausalLM``) on ``batch`` lines of at most ``length`` tokens.

    Many layers run in blocks of a few, which share their graphs, so that compilation does not grow with the depth.
    """

    def __init__(self, model: nn.Cell, batch: int, length: int):
        c = model.config
        self.batch = batch
        self.length = length
        cache = KVCache(
            num_layers=c.num_hidden_layers,
            batch=batch,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            length=length,
            windows=c.windows,
            head_dim=c.head_dim,
            dtype=model.model.stream,
            operators=model.operators,
        )
        layers, windows = list(model.model.layers), c.window_indices
        shares_graphs = model.operators.lends_memory and len(layers) >= sharing.SHARED_FROM
        top = layers_in_blocks(len(layers), BLOCK_LAYERS) if shares_graphs else 0  # the first layer that is in no block
        self.inputs = _Inputs(model, cache).set_train(False)
        self.top = _Top(model, _Layers(layers[top:], windows[top:], cache, top)).set_train(False)
        # MindSpore copies a weight that a graph reads both before and after it writes to a cache, which no operator of
        # the CPU does in bfloat16: then the embedding and the head that is tied to it are in graphs of their own
        one_graph = top == 0 and not (c.tie_word_embeddings and model.dtype == ms.bfloat16)
        self.whole = _Whole(self.inputs, self.top).set_train(False) if one_graph else None
        self.blocks: list[tuple[_Block, Place, list[Parameter]]] = []  # the graph, its place, and who takes it
        kinds: dict[tuple, tuple[_Block, Place]] = {}
        for first in range(0, top, BLOCK_LAYERS):
            here = slice(first, first + BLOCK_LAYERS)
            own = layers[here]
            buffers = [buffer for i in range(first, first + BLOCK_LAYERS) for buffer in cache.of_layer(i)]
            parameters = parameters_of(own) + buffers
            kind = (kind_of(own), windows[here])
            if kind not in kinds:
                graph = _Block(_Layers(own, windows[here], cache, first)).set_train(False)
                kinds[kind] = (graph, Place(parameters))
                parameters = kinds[kind][1].kept
            self.blocks.append((*kinds[kind], parameters))
        self.places = [place for _, place in kinds.values()]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls stand inside; the model's layers have each other's parameters meanwhile."""
        with sharing.sharing(self.places):
            yield

    def run(self, input_ids: NDArray, start: NDArray, lengths: NDArray, last: NDArray) -> tuple[Tensor, Tensor]:
        """New tokens input_ids [b, s] of each line, from slot ``start`` [b] on.

        lengths [b]: see ``Decoder.cached_inputs``. last [b]: of the s tokens of a line, after which one the next is
        wanted. Returns its logits [b, v] and the likeliest ids [b].
        """
        rows = np.arange(self.batch) * input_ids.shape[1] + last
        ids, begin, known, wanted = (Tensor(x.astype(np.int32)) for x in (input_ids, start, lengths, rows))
        if self.whole is not None:
            return self.whole(ids, begin, known, wanted)
        x, *context = self.inputs(ids, begin, known)
        for block, place, parameters in self.blocks:
            place.take(parameters)
            x = block(x, *context)
        return self.top(x, *context, wanted)
