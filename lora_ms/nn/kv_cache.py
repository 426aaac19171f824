"""Keys and values of past tokens, at a fixed length, so that every step of generation has one shape."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from lora_ms.nn.attention import first_in_window
from lora_ms.ops import Operators
from lora_ms.ops.operators import Visibility


class KVCache(nn.Cell):
    """One buffer of keys and one of values a layer, each [b * n_kv * length, d], written in place.

    A token's slot is its position in its line. A slot may be written ahead of its token, by padding: nobody sees it
    before the token is there.

    Args:
        length: slots of a line, in tokens.
        windows: the different ones among the layers: tokens that a query sees, itself included; 0: all before it.
        dtype: of what flows between layers.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        length: int,
        windows: tuple[int, ...],
        head_dim: int,
        dtype: ms.Type,
        operators: Operators,
    ):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.length = length
        self.windows = windows
        shape = (batch * num_kv_heads * length, head_dim)
        layers = range(num_layers)
        self.keys = ParameterTuple([_empty(shape, dtype, f"key_{i}") for i in layers])
        self.values = ParameterTuple([_empty(shape, dtype, f"value_{i}") for i in layers])
        self.visibility = operators.cached_visibility(num_heads=num_heads, num_kv_heads=num_kv_heads, length=length)

    def construct(
        self, new: int, lines: Tensor, start: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Visibility, ...]]:
        """Where ``new`` tokens of each of the lines ``lines`` [n] from slot ``start`` [n] on go.

        lines: all in their order, or fewer. lengths [n * new]: of the tokens' lines; tokens beyond them are padding,
        and see nothing.

        Returns positions [n * new], which tokens are real [n * new], buffer rows [n * n_kv * new], the rows where each
        head of each line begins [n * n_kv], and what each new token sees through each window.
        """
        # constants: MindSpore's compiler takes 0.4 s for an ops.arange
        slots = start.reshape((-1, 1)) + Tensor(np.arange(new, dtype=np.int32)[None])  # [n, new]
        heads = Tensor(np.arange(self.num_kv_heads, dtype=np.int32)[None])
        begins = (lines.reshape((-1, 1)) * self.num_kv_heads + heads) * self.length  # [n, n_kv]
        rows = begins.expand_dims(2) + slots.expand_dims(1)
        real = slots < lengths.reshape(slots.shape)
        low = ops.select(real, ops.zeros_like(slots), slots + 1)
        visible: tuple[Visibility, ...] = ()
        for window in self.windows:
            visible = visible + (self.visibility(first_in_window(low, slots, window), start),)
        return slots.reshape((-1,)), real.reshape((-1,)), rows.reshape((-1,)), begins.reshape((-1,)), visible

    def of_layer(self, i: int) -> list[Parameter]:
        """Keys and values of layer i."""
        return [self.keys[i], self.values[i]]


def _empty(shape: tuple[int, int], dtype: ms.Type, name: str) -> Parameter:
    """A parameter of zeros, whose memory the system hands out when it is first written (a constructor would copy)."""
    parameter = Parameter(Tensor(np.zeros(1), dtype), name, requires_grad=False)
    parameter.assign_value(Tensor.from_numpy(np.zeros(shape, ms.dtype_to_nptype(dtype))))
    return parameter
