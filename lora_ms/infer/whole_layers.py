"""All layers of a decoder as one operator, where they are no more than it knows (``Operators.cached_layers``)."""

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from lora_ms.nn.kv_cache import KVCache
from lora_ms.nn.linear import LayerOperands
from lora_ms.ops import Operators


class WholeLayers(nn.Cell):
    """What ``layers`` compute one after another (``DecoderLayer.cached``), with their parameters: x [b * s, h], what
    stands beside it … -> [b * s, h].

    operands: of each layer. windows: of each, the index of its window.
    """

    def __init__(
        self,
        layers: Sequence[nn.Cell],
        operands: Sequence[LayerOperands],
        windows: Sequence[int],
        cache: KVCache,
        operators: Operators,
    ):
        super().__init__(auto_prefix=False)
        assert operators.cached_layers is not None
        parts: list[int] = []
        parameters: list[Parameter] = []
        for i, (known, window) in enumerate(zip(operands, windows, strict=True)):
            parts += known.parts(window)
            parameters += [*known.parameters(), *cache.of_layer(i)]
        self.layers = nn.CellList(list(layers), auto_prefix=False)  # have the parameters
        self.parts = Tensor(np.array([len(layers), *parts], np.int32))
        self.parameters = ParameterTuple(parameters)
        self.whole = operators.cached_layers(operands[0].eps)

    def construct(self, x: Tensor, context: tuple) -> Tensor:
        return self.whole(x, self.parts, self.parameters, context[:5], context[5:7], context[7:])
