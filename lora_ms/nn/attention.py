"""Self-attention with grouped key/value heads, rotary positions and, for Qwen3, normalised queries and keys."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from lora_ms.nn.head_layout import SwapKernel
from lora_ms.nn.layers import RMSNorm, dense
from lora_ms.nn.parallel import WHOLE, Shard, enter, leave
from lora_ms.ops import native as cpu
from lora_ms.ops.portable import MASKED, AttentionKernel, FlashAttentionKernel, RotaryKernel, fuses


def uses_flash(flash_attention: bool, dtype: ms.Type) -> bool:
    """Whether attention is the fused operator's; ``flash_attention``: it is wanted."""
    return flash_attention and dtype == ms.float16 and fuses()


def attention_bias(attention_mask: Tensor, batch: int, seq: int, num_heads: int, num_kv_heads: int) -> Tensor:
    """0 where a query may look, -1e9 where not: earlier, unmasked keys only; float32 [b * n_kv, g * s, s]."""
    causal = Tensor(np.where(np.tri(seq, dtype=bool), 0.0, MASKED)[None], ms.float32)  # [1, s, s]
    keys = (1.0 - attention_mask.astype(ms.float32)) * MASKED
    bias = ops.tile(ops.minimum(causal, keys.reshape((batch, 1, seq))), (1, num_heads, 1))  # [b, n_h * s, s]
    return bias.reshape((batch * num_kv_heads, -1, seq))


class Attention(nn.Cell):
    """Attention over x [t, h] with t = b * s; shape legend in ``lora_ms.ops.portable``; of ``shard``, its heads."""

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
        shard: Shard = WHOLE,
    ):
        super().__init__()
        num_heads, num_kv_heads = num_heads // shard.count, num_kv_heads // shard.count
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.group = num_heads // num_kv_heads
        self.q_proj = dense(hidden_size, num_heads * head_dim, qkv_bias, dtype)
        self.k_proj = dense(hidden_size, num_kv_heads * head_dim, qkv_bias, dtype)
        self.v_proj = dense(hidden_size, num_kv_heads * head_dim, qkv_bias, dtype)
        self.o_proj = dense(num_heads * head_dim, hidden_size, False, dtype)
        self.enter, self.leave = enter(shard), leave(shard)
        self.qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype)
        self.rotary = RotaryKernel(head_dim)
        self.swap = SwapKernel()
        self.causal = cpu.CausalAttentionOperator() if cpu.there() else nn.Identity()
        self.cache_rows, self.attend_cache = cpu.cache_rows(), cpu.attend_cache()
        self.kernel = FlashAttentionKernel() if uses_flash(flash_attention, dtype) else AttentionKernel()

    def split_heads(self, x: Tensor, batch: int, num_heads: int) -> Tensor:
        x = x.reshape((-1, self.head_dim))  # [b * s * n, d]
        x = self.swap(x, batch, x.shape[0] // (batch * num_heads), num_heads)
        return x.reshape((batch * self.num_kv_heads, -1, self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [t * n_h, d], keys [t * n_kv, d], not rotated, and values [t, n_kv * d]."""
        x = self.enter(x)
        q = self.q_proj(x).reshape((-1, self.head_dim))
        k = self.k_proj(x).reshape((-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, self.v_proj(x)

    def by_tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [t, n_h * d], keys and values [t, n_kv * d], nothing rotated."""
        q, k, v = self.project(x)
        return q.reshape((v.shape[0], -1)), k.reshape((v.shape[0], -1)), v

    def by_heads(self, x: Tensor, rope: tuple, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b * n_kv, g * s, d], scaled by 1/sqrt(d), keys and values [b * n_kv, s, d]."""
        q, k, v = self.project(x)
        q, k = self.rotary(q, rope[0], rope[1]), self.rotary(k, rope[2], rope[3])
        return (
            self.split_heads(q, batch, self.num_heads),
            self.split_heads(k, batch, self.num_kv_heads),
            self.split_heads(v, batch, self.num_kv_heads),
        )

    def merge_heads(self, x: Tensor, batch: int) -> Tensor:
        x = x.reshape((-1, self.head_dim))  # [b * n_h * s, d]
        x = self.swap(x, batch, self.num_heads, x.shape[0] // (batch * self.num_heads))
        return x.reshape((-1, self.num_heads * self.head_dim))

    def mix(self, x: Tensor, rope: tuple, bias: Tensor) -> Tensor:
        """Attention without its output projection: [t, h] -> [t, n_h * d]."""
        if bias.ndim == 2:  # what RowMask gives for our own operator
            q, k, v = self.by_tokens(x)
            return self.causal(q, k, v, rope[2], rope[3], bias)[0]
        batch = bias.shape[0] if bias.ndim == 4 else bias.shape[0] // self.num_kv_heads
        q, k, v = self.by_heads(x, rope, batch)
        output, _ = self.kernel(q, k, v, bias)  # [b * n_kv, g * s, d]
        return self.merge_heads(output, batch)

    def output(self, x: Tensor) -> Tensor:
        """The output projection: [t, n_h * d] -> [t, h]."""
        return self.leave(self.o_proj(x))

    def mix_cached(self, x: Tensor, rope: tuple, bias: Tensor, cache: nn.Cell, layer: int, rows: Tensor) -> Tensor:
        """As ``mix``, for new tokens that also look at those in ``cache``, into which they are written."""
        if bias.ndim == 2:  # what KVCache gives for our own operators
            q, k, v = self.by_tokens(x)
            new_keys, new_values = self.cache_rows(k, v, rope[2], rope[3], bias)
            keys = cache.write(cache.keys[layer], rows, new_keys)
            values = cache.write(cache.values[layer], rows, new_values)
            if bias.shape[1] > 1:  # a prompt, which looks at nothing but itself
                q = ops.depend(q, (keys, values))  # the compiler leaves out a write whose result nobody wants
                return self.causal(q, k, v, rope[2], rope[3], bias)[0]
            return self.attend_cache(q, keys, values, rope[2], rope[3], bias, rows)
        q, k, v = self.by_heads(x, rope, cache.batch)
        k = cache.write(cache.keys[layer], rows, k)
        v = cache.write(cache.values[layer], rows, v)
        output = self.kernel(q, k, v, bias)[0]  # MindSpore warns of an unused name behind a write
        return self.merge_heads(output, cache.batch)

    def construct(self, x: Tensor, rope: tuple, bias: Tensor) -> Tensor:
        return self.output(self.mix(x, rope, bias))
