"""Prefix tuning on the embedding, where rows get their virtual tokens, and in every attention, which sees other keys
and values in these places.

Shapes: p virtual tokens, w width of a layer's keys, t tokens.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Target
from lora_ms.adapters.methods.base_cells import AdapterCell
from lora_ms.adapters.methods.prefix import NETWORK
from lora_ms.adapters.methods.virtual import NOT_MERGED, TENSOR, PromptSpec
from lora_ms.adapters.methods.virtual_cells import VirtualEmbedding
from lora_ms.errors import LoraMsError
from lora_ms.nn.attention import KeysAndValues
from lora_ms.nn.layers import Embedding

if TYPE_CHECKING:
    from lora_ms.adapters.methods.prefix import PrefixTuningConfig

Array = NDArray[np.float32]


class LayerPrefix(nn.Cell):
    """Keys and values of one layer [p, 2 w], which train themselves."""

    def __init__(self, start: Array):
        super().__init__(auto_prefix=False)
        self.layer_prefix = Parameter(Tensor(start), "layer_prefix")

    def construct(self) -> Tensor:
        return self.layer_prefix


class Network(nn.Cell):
    """What all layers' keys and values come out of. parameters: by ``NETWORK``'s names."""

    def __init__(self, parameters: Mapping[str, Parameter]):
        super().__init__(auto_prefix=False)
        self.embedding, self.inner, self.inner_bias, self.outer, self.outer_bias = (parameters[n] for n in NETWORK)
        self.product = ops.MatMul(transpose_b=True)

    def rows(self, first: int, last: int) -> Tensor:
        """[p, last - first] of the outputs."""
        x = ops.tanh(self.product(self.embedding, self.inner) + self.inner_bias)
        return self.product(x, self.outer[first:last]) + self.outer_bias[first:last]


class ProjectedPrefix(nn.Cell):
    """Keys and values of layer ``number`` [p, 2 w], out of the network."""

    def __init__(self, network: Network, number: int, width: int):
        super().__init__(auto_prefix=False)
        self.network = network
        self.first, self.last = 2 * width * number, 2 * width * (number + 1)

    def construct(self) -> Tensor:
        return self.network.rows(self.first, self.last)


class PrefixKeysAndValues(AdapterCell):
    """Trained keys and values in the place of those at the positions 0 to p - 1."""

    TITLE = "prefix tuning"
    base: KeysAndValues

    def __init__(self, base: KeysAndValues, prefix: nn.Cell, tokens: int):
        super().__init__()
        self.base = base
        self.prefix = prefix
        self.tokens = tokens
        self.spread = ops.MatMul()

    def tensors(self) -> dict[str, Parameter]:
        """They belong to the embedding's cell."""
        return {}

    def merge(self) -> nn.Cell:
        raise LoraMsError(f"{self.TITLE}: {NOT_MERGED}")

    def put(self, x: Tensor, own: Tensor, here: Tensor) -> Tensor:
        spread = self.spread(here.astype(x.dtype), ops.ones((1, x.shape[1]), x.dtype))
        return x * (1 - spread) + own.astype(x.dtype) * spread

    def construct(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        here = (positions < self.tokens).astype(ms.float32).reshape((-1, 1))
        own = ops.gather(self.prefix(), ops.minimum(positions, self.tokens - 1), 0)  # [t, 2 w]
        width = keys.shape[1]
        return self.put(keys, own[:, :width], here), self.put(values, own[:, width:], here)


class PrefixEmbedding(VirtualEmbedding):
    """A ``VirtualEmbedding`` whose virtual tokens have no vectors: what they compute, nobody sees.

    Args:
        start: by ``NETWORK``'s names, or "" and all keys and values [p, layers * 2 w].
    """

    TITLE = "prefix tuning"

    def __init__(self, base: Embedding, tokens: int, layers: int, start: dict[str, Array]):
        super().__init__(base, tokens)
        self.unrotated = tokens
        self.layers = layers
        self.places: list[PrefixKeysAndValues] = []
        self.projects = len(start) > 1
        if self.projects:
            parameters = {name: Parameter(Tensor(value), name.replace(".", "_")) for name, value in start.items()}
            self._network = parameters
            self.network = Network(parameters)
            self.width = start[NETWORK[0]].shape[1]
        else:
            self._start = start[TENSOR]
            self.width = self._start.shape[1] // (2 * layers)

    def attached(self, bases: Mapping[str, KeysAndValues]) -> dict[str, nn.Cell]:
        """The cells of the layers, by path; bases: what they replace, in the layers' order."""
        found: dict[str, nn.Cell] = {}
        for number, (path, base) in enumerate(bases.items()):
            if self.projects:
                prefix: nn.Cell = ProjectedPrefix(self.network, number, self.width)
            else:
                prefix = LayerPrefix(np.ascontiguousarray(np.split(self._start, self.layers, 1)[number]))
            found[path] = PrefixKeysAndValues(base, prefix, self.virtual_tokens)
        self.__dict__["places"] = list(found.values())
        return found

    @property
    def spec(self) -> PromptSpec:
        return PromptSpec(self.virtual_tokens)

    def tensors(self) -> dict[str, Parameter]:
        if self.projects:
            return dict(self._network)
        return {f"layer_{number}": place.prefix.layer_prefix for number, place in enumerate(self.places)}

    def export(self) -> dict[str, Array]:
        values = super().export()
        if self.projects:
            return {TENSOR: self.network.rows(0, 2 * self.width * self.layers).asnumpy(), **values}
        return {TENSOR: np.concatenate(list(values.values()), 1)}

    def accept(self, values: dict[str, Array]) -> dict[str, Array]:
        if any(name in values for name in NETWORK):
            return {name: value for name, value in values.items() if name != TENSOR}
        if TENSOR not in values or values[TENSOR].shape[1] % self.layers:
            return values
        parts = np.split(values[TENSOR], self.layers, 1)
        if self.projects:  # a file that has lost the network: the keys and values themselves train
            self.projects = False
            for parameter in self._network.values():
                parameter.requires_grad = False
            for place, part in zip(self.places, parts, strict=True):
                place.prefix = LayerPrefix(np.ascontiguousarray(part))
        return {f"layer_{number}": part for number, part in enumerate(parts)}

    def construct(self, input_ids: Tensor) -> Tensor:
        """ids [t] -> [t, h]."""
        ids = input_ids.astype(ms.int32)
        return self.base(ids * (ids < self.vocab_size).astype(ms.int32))


def build(config: "PrefixTuningConfig", target: Target) -> AdapterCell:
    """See ``AdapterConfig.build``; config: fitted. It starts as torch's layers do."""
    rng = np.random.default_rng(np.random.randint(2**31))  # NumPy's stream, which mindspore.set_seed sets
    tokens = config.num_virtual_tokens
    start = {TENSOR: rng.standard_normal((tokens, config.layers * 2 * config.width))}
    if config.prefix_projection:
        shapes = config.network()
        start = {NETWORK[0]: rng.standard_normal(shapes[NETWORK[0]])}
        for name, shape in list(shapes.items())[1:]:
            inputs = config.width if ".0." in name else config.encoder_hidden_size
            start[name] = rng.uniform(-1, 1, shape) / math.sqrt(inputs)
    return PrefixEmbedding(
        target.layer, tokens, config.layers, {name: value.astype(np.float32) for name, value in start.items()}
    )


def beside(cells: Mapping[str, nn.Cell], built: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
    """See ``AdapterConfig.beside``."""
    (embedding,) = (cell for cell in built.values() if isinstance(cell, PrefixEmbedding))
    return embedding.attached({path: cell for path, cell in cells.items() if type(cell) is KeysAndValues})
