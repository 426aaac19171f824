"""All layers of a decoder as one operator, where they are no more than it knows (``Operators.cached_layers``)."""

from collections.abc import Sequence

from mindspore import Tensor

from lora_ms.nn.kv_cache import KVCache
from lora_ms.nn.linear import LayerOperands
from lora_ms.ops import Operators


class WholeLayers:
    """What layers compute one after another (``DecoderLayer.cached``): x [b * s, h], what stands beside it … -> [b * s,
    h].

    operands: of each layer. windows: of each, the index of its window.
    """

    def __init__(self, operands: Sequence[LayerOperands], windows: Sequence[int], cache: KVCache, operators: Operators):
        assert operators.cached_layers is not None
        parts = [number for known, window in zip(operands, windows, strict=True) for number in known.parts(window)]
        parameters = [p for i, known in enumerate(operands) for p in (*known.parameters(), *cache.of_layer(i))]
        self.layers = operators.cached_layers(operands[0].eps, [len(operands), *parts], parameters)

    def __call__(self, x: Tensor, context: Sequence[Tensor]) -> Tensor:
        return self.layers(x, context[:5], context[5:7], context[7:])
