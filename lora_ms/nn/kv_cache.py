"""Keys and values of past tokens, at a fixed length, so that every step of generation has one shape."""

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from lora_ms.ops import Operators
from lora_ms.ops.operators import Visibility


class KVCache(nn.Cell):
    """One buffer of keys and one of values a layer, each [b * n_kv * length, d], written in place.

    Prompts are left-padded, so that all rows of a batch write the same slots. More than one new token is a prompt: it
    starts at slot 0.

    Args:
        length: slots of a line, in tokens.
        dtype: of what flows between layers.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        dtype: ms.Type,
        operators: Operators,
    ):
        super().__init__()
        self.batch = batch
        self.num_kv_heads = num_kv_heads
        self.length = length
        shape = (batch * num_kv_heads * length, head_dim)
        layers = range(num_layers)
        self.keys = ParameterTuple([Parameter(ops.zeros(shape, dtype), f"key_{i}", False) for i in layers])
        self.values = ParameterTuple([Parameter(ops.zeros(shape, dtype), f"value_{i}", False) for i in layers])
        self.visibility = operators.cached_visibility(num_heads=num_heads, num_kv_heads=num_kv_heads, length=length)

    def construct(self, start: Tensor, padding: Tensor, new: int) -> tuple[Tensor, Tensor, Visibility]:
        """Where ``new`` tokens from slot ``start`` [] go, after ``padding`` [b] slots that hold nothing.

        Returns positions [b * new], buffer rows [b * n_kv * new] and what each new token sees.
        """
        slots = (start + ops.arange(new)).reshape((1, new))
        before = padding.reshape((-1, 1))
        positions = ops.maximum(slots - before, 0)
        lines = ops.arange(self.batch * self.num_kv_heads) * self.length
        rows = lines.reshape((-1, 1)) + slots
        first = ops.minimum(ops.tile(before, (1, new)), slots).astype(ms.int32)  # padding sees itself
        return positions.reshape((-1,)), rows.reshape((-1,)).astype(ms.int32), self.visibility(first, start)

    def layer(self, i: int, rows: Tensor) -> tuple:
        """What the attention of layer i takes as its cache."""
        return self.keys[i], self.values[i], rows
