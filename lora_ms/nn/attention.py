"""Self-attention with grouped key/value heads, rotary positions and, for Qwen3, normalised queries and keys."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.nn.layers import MakeProjection, RMSNorm
from lora_ms.nn.linear import Operands, operands_of
from lora_ms.nn.parallel import WHOLE, Shard, sum_gradient, sum_output
from lora_ms.ops import Operators
from lora_ms.ops.operators import Visibility


def first_in_window(first: Tensor, places: Tensor, window: int) -> Tensor:
    """The earliest key [b, s] that each query sees: ``first`` [b, s], or that of its last ``window`` tokens.

    places [b, s] or [1, s]: the queries' own places in their lines. window: in tokens, the query included; 0 for none.
    """
    return ops.maximum(first, places - (window - 1)) if window else first


class KeysAndValues(nn.Cell):
    """Where a method of adapting can put keys and values of its own in the place of some tokens': keys [t, n_kv * d] as
    they are before the rotation, values likewise, each token's position in its row [t] -> keys and values."""

    def construct(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


class Attention(nn.Cell):
    """Attention over x [t, h] with t = b * s; shape legend in ``lora_ms.ops.portable``; of ``shard``, its heads.

    Args:
        qkv_bias: whether q, k and v have biases.
        qk_norm_eps: eps of the norms on queries and keys; None for no norms.
        flash_attention: whether to use the device's fused attention, where it has one.
        dtype: of the norms' weights.
        make: makes the projections.
        rotates: whether queries and keys are rotated by their positions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        qk_norm_eps: float | None,
        flash_attention: bool,
        dtype: ms.Type,
        make: MakeProjection,
        operators: Operators,
        shard: Shard = WHOLE,
        rotates: bool = True,
    ):
        super().__init__()
        num_heads = num_heads // shard.count
        num_kv_heads = num_kv_heads // shard.count
        self.head_dim = head_dim
        self.q_proj = make("q_proj", hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = make("k_proj", hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = make("v_proj", hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = make("o_proj", num_heads * head_dim, hidden_size, False)
        self.sum_gradient = sum_gradient(shard)
        self.sum_output = sum_output(shard)
        self.qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype, operators)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype, operators)
        self.rotates = rotates
        self.prefix = KeysAndValues()
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.attention = operators.attention(**sizes, dtype=dtype, flash=flash_attention)
        self.cached_attention = operators.cached_attention(**sizes, dtype=dtype, flash=flash_attention)

    def inner(self) -> list[nn.Cell]:
        """What stands between the projections."""
        return [*self.norms(), self.prefix]

    def operands(self) -> list[Operands] | None:
        """Of q, k, v and o; None: there is more to it than these and the norms."""
        if type(self.prefix) is not KeysAndValues:
            return None
        return operands_of((self.q_proj, self.k_proj, self.v_proj, self.o_proj))

    def norms(self) -> list[nn.Cell]:
        """Those of queries and keys."""
        return [self.q_norm, self.k_norm] if self.qk_norm else []

    def normalised(self, x: Tensor, norm: nn.Cell) -> Tensor:
        """x [t, n * d] with each head normalised."""
        return norm(x.reshape((-1, self.head_dim))).reshape(x.shape)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [t, h] -> queries [t, n_h * d], keys and values [t, n_kv * d], neither normalised nor rotated."""
        x = self.sum_gradient(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as Qwen3 normalises them, of the others as they are; keys and values behind ``prefix``.

        rope: what ``Decoder.rope`` gives.
        """
        if self.qk_norm:
            q, k = self.normalised(q, self.q_norm), self.normalised(k, self.k_norm)
        k, v = self.prefix(k, v, rope[4])
        return q, k, v

    def tables(self, rope: tuple) -> tuple[Tensor, ...]:
        """The four rotary tables of ``rope``; of a layer that does not rotate, those of the angle 0."""
        if self.rotates:
            return rope[:4]
        q, k = rope[0], rope[2]
        return ops.full_like(q, self.head_dim**-0.5), ops.zeros_like(q), ops.ones_like(k), ops.zeros_like(k)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Visibility) -> Tensor:
        """Attention on what ``project`` gives -> [t, n_h * d]."""
        q, k, v = self.prepare(q, k, v, rope)
        return self.attention(q, k, v, self.tables(rope), visible)

    def mix_keeping(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Visibility) -> tuple[Tensor, ...]:
        """As ``mix``, and what its gradient needs besides …."""
        q, k, v = self.prepare(q, k, v, rope)
        return self.attention.keeping(q, k, v, self.tables(rope), visible)

    def mix_known(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Visibility, kept: tuple) -> Tensor:
        """What ``mix_keeping`` gave, ``kept``, to be differentiated: [t, n_h * d]."""
        q, k, v = self.prepare(q, k, v, rope)
        return self.attention.known(q, k, v, self.tables(rope), visible, kept)

    def mix_cached(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple, visible: Visibility, cache: tuple) -> Tensor:
        """As ``mix``, for new tokens that also look at those in ``cache``, where they are put."""
        q, k, v = self.prepare(q, k, v, rope)
        return self.cached_attention(q, k, v, self.tables(rope), visible, cache)

    def output(self, x: Tensor) -> Tensor:
        """The output projection: [t, n_h * d] -> [t, h]."""
        return self.sum_output(self.o_proj(x))

    def construct(self, x: Tensor, rope: tuple, visible: Visibility) -> Tensor:
        q, k, v = self.project(x)
        return self.output(self.mix(q, k, v, rope, visible))
