"""Rotary position tables (Su et al., 2021), with the scalings of Llama 3.1 and position interpolation."""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> np.ndarray:
    """Rotation per position, in radians, of each of the ``head_dim / 2`` pairs; float64 [d / 2].

    scaling: None, or ``{"rope_type": "linear", "factor"}``, or ``{"rope_type": "llama3", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}`` as config.json has it.
    """
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # llama3: pairs that turn rarely within the original context are slowed by the factor, those that turn often are
    # kept, and those between are blended, linearly in their number of turns
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (kept_share + (1 - kept_share) / scaling["factor"])


class RotaryTables(nn.Cell):
    """Cosine and sine of every token's rotations, spread over the heads.

    position_ids [t] -> (cos_q, sin_q [t * n_h, d], cos_k, sin_k [t * n_kv, d]). The query's tables carry the
    attention's 1/sqrt(d), and the first half of the sine its minus sign (see ``ops.portable.Rotary``).
    """

    def __init__(self, head_dim: int, num_heads: int, num_kv_heads: int, inv_freq: np.ndarray, dtype: ms.Type):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.inv_freq = Tensor(np.concatenate((inv_freq, inv_freq)), ms.float32)  # [d]
        self.sign = Tensor(np.repeat([-1.0, 1.0], head_dim // 2), ms.float32)
        self.scale = head_dim**-0.5
        self.dtype = dtype

    def spread(self, table: Tensor, num_heads: int) -> Tensor:
        """[t, d] -> [t * num_heads, d]: a row for every head of every token."""
        return ops.tile(table.astype(self.dtype), (1, num_heads)).reshape((-1, self.head_dim))

    def construct(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angles = position_ids.astype(ms.float32).reshape((-1, 1)) * self.inv_freq  # [t, d]
        cos = ops.cos(angles)
        sin = ops.sin(angles) * self.sign
        return (
            self.spread(cos * self.scale, self.num_heads),
            self.spread(sin * self.scale, self.num_heads),
            self.spread(cos, self.num_kv_heads),
            self.spread(sin, self.num_kv_heads),
        )
