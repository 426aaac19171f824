"""Self-attention with grouped key/value heads, rotary positions and, for Qwen3, normalised queries and keys."""

import mindspore as ms
from mindspore import Tensor, nn

from lora_ms.nn.layers import RMSNorm, projection
from lora_ms.nn.parallel import WHOLE, Shard, sum_gradient, sum_output
from lora_ms.ops import Operators
from lora_ms.ops.operators import Visibility


class Attention(nn.Cell):
    """Attention over x [t, h] with t = b * s; shape legend in ``lora_ms.ops.portable``; of ``shard``, its heads.

    Args:
        qkv_bias: whether q, k and v have biases.
        qk_norm_eps: eps of the norms on queries and keys; None for no norms.
        flash_attention: whether to use the device's fused attention, where it has one.
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
        operators: Operators,
        shard: Shard = WHOLE,
    ):
        super().__init__()
        num_heads = num_heads // shard.count
        num_kv_heads = num_kv_heads // shard.count
        self.head_dim = head_dim
        common = {"dtype": dtype, "operators": operators}
        self.q_proj = projection(hidden_size, num_heads * head_dim, has_bias=qkv_bias, **common)
        self.k_proj = projection(hidden_size, num_kv_heads * head_dim, has_bias=qkv_bias, **common)
        self.v_proj = projection(hidden_size, num_kv_heads * head_dim, has_bias=qkv_bias, **common)
        self.o_proj = projection(num_heads * head_dim, hidden_size, has_bias=False, **common)
        self.sum_gradient = sum_gradient(shard)
        self.sum_output = sum_output(shard)
        self.qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype, operators)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype, operators)
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.attention = operators.attention(**sizes, dtype=dtype, flash=flash_attention)
        self.cached_attention = operators.cached_attention(**sizes, dtype=dtype, flash=flash_attention)

    def normalised(self, x: Tensor, norm: nn.Cell) -> Tensor:
        """x [t, n * d] with each head normalised."""
        return norm(x.reshape((-1, self.head_dim))).reshape(x.shape)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [t, n_h * d], keys and values [t, n_kv * d], not rotated."""
        x = self.sum_gradient(x)
        q = self.q_proj(x)
        k = self.k_proj(x)
        if self.qk_norm:
            q = self.normalised(q, self.q_norm)
            k = self.normalised(k, self.k_norm)
        return q, k, self.v_proj(x)

    def mix(self, x: Tensor, rope: tuple, visible: Visibility) -> Tensor:
        """Attention without its output projection: [t, h] -> [t, n_h * d]."""
        q, k, v = self.project(x)
        return self.attention(q, k, v, rope, visible)

    def mix_cached(self, x: Tensor, rope: tuple, visible: Visibility, cache: tuple) -> Tensor:
        """As ``mix``, for new tokens that also look at those in ``cache`` (keys, values, rows), where they are put."""
        q, k, v = self.project(x)
        return self.cached_attention(q, k, v, rope, visible, cache)

    def output(self, x: Tensor) -> Tensor:
        """The output projection: [t, n_h * d] -> [t, h]."""
        return self.sum_output(self.o_proj(x))

    def construct(self, x: Tensor, rope: tuple, visible: Visibility) -> Tensor:
        return self.output(self.mix(x, rope, visible))
