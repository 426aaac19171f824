"""A model with a cache of keys and values, compiled for two lengths of input: a piece of a prompt, and one token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.infer.whole_layers import WholeLayers
from lora_ms.nn import sharing
from lora_ms.nn.graph import Graph
from lora_ms.nn.kv_cache import KVCache
from lora_ms.nn.linear import known_layers
from lora_ms.nn.sharing import Place, kind_of, parameters_of

PIECE = 64  # tokens of a prompt that are read at a time while others wait
PIECES = 4  # that may be read at once, where padding costs little
SHORTEST_CACHE = 512  # tokens; a cache that is read whole at every token has this times a power of two
LEAST_LENGTH = 2048  # for which there is room in any case, where texts are not known
CACHE_BYTES = 2 << 30  # of a cache that costs nothing before it is filled; more where the answers need it
BLOCK_LAYERS = 3  # a call of a graph takes some 0.7 ms of Python and MindSpore


def cache_length(model: nn.Cell, batch: int, needed: int) -> int:
    """Tokens of a line of the cache: few lengths, few compilations.

    Where slots that are not in use cost nothing, it is the longest text of the model, as far as ``CACHE_BYTES`` allow;
    else a few times what is needed, at most.
    """
    c = model.config
    length = SHORTEST_CACHE
    while length < needed:
        length *= 2
    if not model.operators.reads_used_slots:
        return length
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4  # bytes
    fitting = SHORTEST_CACHE
    while 2 * fitting * token * batch <= CACHE_BYTES:
        fitting *= 2
    longest = -(-c.longest // PIECE) * PIECE
    return max(length, min(longest, fitting))


def default_length(model: nn.Cell, batch: int, longest: int) -> int:
    """Tokens of a line of the cache for texts that are not known yet: ``longest``, as far as memory is sensible."""
    return min(longest, cache_length(model, batch, min(longest, LEAST_LENGTH)))


class _Inputs(Graph):
    """ids [b, s], lines [b], start [b], lengths [b] -> what the layers take …; see ``DecoderInputs.cached_inputs``."""

    def __init__(self, model: nn.Cell, cache: KVCache):
        super().__init__(auto_prefix=False)
        self.inputs = model.model.alone()
        self.cache = cache

    def construct(self, input_ids: Tensor, lines: Tensor, start: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return self.inputs.cached_inputs(input_ids, self.cache, lines, start, lengths)


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
        rope, rows, begins = context[:5], context[5], context[6]
        for i in range(len(self.layers)):
            visible = context[7 + self.windows[i]]
            x = self.layers[i].cached(x, rope, visible, (self.keys[i], self.values[i], rows, begins))
        return x


class _Block(Graph):
    """x [b * s, h], what stands beside it … -> [b * s, h]."""

    def __init__(self, layers: _Layers):
        super().__init__(auto_prefix=False)
        self.layers = layers

    def construct(self, x: Tensor, *context) -> Tensor:
        return self.layers(x, context)


class _Top(Graph):
    """x [b * s, h], what stands beside it …, rows [n] -> (logits [n, v] of the tokens ``rows``, likeliest ids [n], what
    the last layer gave [b * s, h])."""

    title = "generation"

    def __init__(self, model: nn.Cell, layers: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layers = layers
        self.outputs = model.outputs()
        self.argmax = ops.Argmax(-1, ms.int32)

    def construct(self, x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layers(x, others[:-1])
        logits = self.outputs(x, others[-1])
        return logits, self.argmax(logits), x


class _Whole(Graph):
    """All of it as one graph: for a few layers."""

    title = "generation"

    def __init__(self, inputs: _Inputs, top: _Top):
        super().__init__(auto_prefix=False)
        self.inputs = inputs
        self.top = top

    def construct(
        self, input_ids: Tensor, lines: Tensor, start: Tensor, lengths: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.top(*self.inputs(input_ids, lines, start, lengths), rows)


class _Scores(Graph):
    """What the last layer gave x [t, h] -> logits [t, v] of all tokens."""

    title = "the scores of prompts"

    def __init__(self, model: nn.Cell, tokens: int):
        super().__init__(auto_prefix=False)
        self.outputs = model.outputs()
        self.rows = Tensor(np.arange(tokens, dtype=np.int32))

    def construct(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.rows)


class _Copy(Graph):
    """Rows ``source`` [n] of all buffers of a cache are copied to its rows ``target`` [n]."""

    def __init__(self, cache: KVCache):
        super().__init__(auto_prefix=False)
        self.buffers = ParameterTuple([*cache.keys, *cache.values])

    def construct(self, source: Tensor, target: Tensor) -> Tensor:
        for i in range(len(self.buffers)):
            ops.scatter_update(self.buffers[i], target, ops.gather(self.buffers[i], source, 0))
        return target


class CachedModel:
    """``model`` (a ``CausalLM``) on ``batch`` lines of at most ``length`` tokens; prompts are read in pieces.

    ``read`` and ``next`` stand inside ``running``, and ``copy`` outside. All layers are one operator, where one knows
    them, and what is behind them another, so that the inputs' graph alone is compiled; else many layers run in blocks
    of a few, which share their graphs, so that compilation does not grow with the depth.

    Attributes:
        most: tokens that ``read`` takes at once.
    """

    def __init__(self, model: nn.Cell, batch: int, length: int, piece: int = PIECE):
        c = model.config
        self.batch = batch
        self.all_lines = Tensor(np.arange(batch, dtype=np.int32))
        self.length = length
        self.piece = piece
        # a rotation that grows with the text is told its whole length, which then does not tell where padding begins
        self.grows = model.model.rotary_tables.grows
        several = model.operators.padding_cost < 1 and not self.grows
        self.most = piece * PIECES if several else piece
        self.num_kv_heads = c.num_key_value_heads
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
        known = None if model.operators.cached_layers is None else known_layers(layers)
        self.joined = None if known is None else WholeLayers(known, windows, cache, model.operators)
        make, head = model.operators.head_logits, model.outputs().operands()
        self.head = make(*head) if known is not None and make is not None and head is not None else None
        shares_graphs = known is None and model.operators.lends_memory and len(layers) >= sharing.SHARED_FROM
        # layers in blocks: all, where it can be, as each that is compiled besides takes its time
        blocks = len(layers) // BLOCK_LAYERS if shares_graphs else 0
        top = len(layers) if known is not None else blocks * BLOCK_LAYERS  # the first layer that is in the top's graph
        self.inputs = _Inputs(model, cache).set_train(False)
        if self.head is not None:
            self.inputs.title = _Top.title  # the only graph
        self.top = _Top(model, _Layers(layers[top:], windows[top:], cache, top)).set_train(False)
        # where MindSpore's own operators write to the cache, a weight that is read before and behind it is copied;
        # in bfloat16 the embedding and the head that is tied to it are in graphs of their own there
        copies = not model.operators.reads_used_slots and c.tie_word_embeddings and model.dtype == ms.bfloat16
        self.whole = _Whole(self.inputs, self.top).set_train(False) if top == 0 and not copies else None
        self._scores = _Scores(model, self.most).set_train(False)
        self._copy = _Copy(cache).set_train(False)
        self.blocks: list[tuple[_Block, Place, list[Parameter]]] = []  # the graph, its place, and who takes it
        kinds: dict[tuple, tuple[_Block, Place]] = {}
        for first in range(0, blocks * BLOCK_LAYERS, BLOCK_LAYERS):
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

    def read(self, line: int, part: NDArray, start: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """A part of a prompt, at most ``most`` ids, into the slots of ``line`` from ``start`` on.

        length: of the prompt, which matters to a rotation that grows with the text.
        Returns the logits [1, v] of what follows it, the likeliest id [1], and what ``scores`` takes.
        """
        ids = np.zeros(self.most, np.int32)
        ids[: len(part)] = part
        if not self.grows:
            length = start + len(part)
        places = (np.array([number]) for number in (line, start, length))
        return self._run(ids[None], *places, np.array([len(part) - 1]))

    def next(self, ids: NDArray, start: NDArray, lengths: NDArray) -> tuple[Tensor, Tensor]:
        """A token of each line, ids [b], into the slots ``start`` [b]; nothing is computed of a line that has no more
        than ``start`` tokens, by ``lengths`` [b].

        Returns the logits [b, v] of the next tokens, and the likeliest ids [b].
        """
        return self._run(ids[:, None], self.all_lines, start, lengths, self.all_lines)[:2]

    def scores(self, hidden: Tensor) -> NDArray:
        """The logits [most, v] of what follows each token of the part for which ``read`` gave ``hidden``."""
        return self._scores(hidden).asnumpy()

    def copy(self, source: int, target: int, start: int) -> None:
        """The keys and values of a piece, in the slots from ``start`` on, from one line to another."""
        slots = np.arange(start, start + self.piece)
        heads = np.arange(self.num_kv_heads).reshape(-1, 1)
        rows = (((line * self.num_kv_heads + heads) * self.length + slots).reshape(-1) for line in (source, target))
        self._copy(*(Tensor(x.astype(np.int32)) for x in rows))

    def _run(self, *inputs: NDArray | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [b, s], lines, start, lengths [b], and rows: see ``_Whole``."""
        tensors = [x if isinstance(x, Tensor) else Tensor(x.astype(np.int32)) for x in inputs]
        if self.whole is not None:
            return self.whole(*tensors)
        x, *context = self.inputs(*tensors[:-1])
        if self.joined is not None:
            x = self.joined(x, context)
        if self.head is not None:
            logits = self.head(x, tensors[-1])
            return Tensor.from_numpy(logits), Tensor(np.argmax(logits, -1).astype(np.int32)), x
        for block, place, parameters in self.blocks:
            place.take(parameters)
            x = block(x, *context)
        return self.top(x, *context, tensors[-1])
