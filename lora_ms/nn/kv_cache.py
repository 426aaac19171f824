"""Keys and values of past tokens, at a fixed length, so that every step of generation has one shape."""

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from lora_ms.ops import native as cpu
from lora_ms.ops.portable import MASKED


class KVCache(nn.Cell):
    """One buffer of keys and one of values a layer, each [b * n_kv * length, d], written in place.

    Prompts are left-padded, so that all rows of a batch write the same slots. More than one new token is a prompt: it
    starts at slot 0.
    """

    def __init__(
        self, num_layers: int, batch: int, num_kv_heads: int, group: int, length: int, head_dim: int, dtype: ms.Type
    ):
        super().__init__()
        self.batch, self.num_kv_heads, self.group, self.length = batch, num_kv_heads, group, length
        self.own = cpu.there()
        shape = (batch * num_kv_heads * length, head_dim)
        layers = range(num_layers)
        self.keys = ParameterTuple([Parameter(ops.zeros(shape, dtype), f"key_{i}", False) for i in layers])
        self.values = ParameterTuple([Parameter(ops.zeros(shape, dtype), f"value_{i}", False) for i in layers])

    def construct(self, start: Tensor, padding: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where ``new`` tokens from slot ``start`` [] go, after ``padding`` [b] slots that hold nothing.

        Returns positions [b * new], buffer rows [b * n_kv * new] and the attention's bias
        [b * n_kv, g * new, length]; where the CPU has operators of ours, the first slot that a token sees instead,
        int32 [b, new].
        """
        slots = start + ops.arange(new)  # [new]
        positions = ops.maximum(slots.reshape((1, new)) - padding.reshape((-1, 1)), 0)
        first = ops.arange(self.batch * self.num_kv_heads) * self.length
        rows = first.reshape((-1, 1)) + slots.reshape((1, new))
        if self.own:
            first = ops.minimum(ops.tile(padding.reshape((-1, 1)), (1, new)), slots.reshape((1, new)))
            return positions.reshape((-1,)), rows.reshape((-1,)).astype(ms.int32), first.astype(ms.int32)
        keys = ops.arange(self.length)
        seen = ops.logical_and(
            keys.reshape((1, 1, -1)) <= slots.reshape((1, new, 1)),
            keys.reshape((1, 1, -1)) >= padding.reshape((-1, 1, 1)),
        )  # [b, new, length]
        bias = ops.tile((1.0 - seen.astype(ms.float32)) * MASKED, (1, self.num_kv_heads * self.group, 1))
        bias = bias.reshape((self.batch * self.num_kv_heads, -1, self.length))
        return positions.reshape((-1,)), rows.reshape((-1,)).astype(ms.int32), bias

    def write(self, buffer: Parameter, rows: Tensor, new: Tensor) -> Tensor:
        """Puts ``new`` [b * n_kv, s, d] into ``buffer``; returns all of it, [b * n_kv, length, d]."""
        head_dim = new.shape[-1]
        written = ops.scatter_update(buffer, rows, new.reshape((-1, head_dim)))
        return written.reshape((-1, self.length, head_dim))
