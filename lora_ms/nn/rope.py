"""Rotary position tables (Su et al., 2021) and their scalings for texts longer than a model was trained on."""

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are rotated.

    Fields:
        inv_freq: radians per position of each of the d / 2 pairs; float64 [d / 2].
        attention_factor: on cosine and sine, so that its square is on the scores (YaRN).
        growth: of dynamic NTK: the factor, and the length in tokens beyond which a row's base grows.
    """

    inv_freq: NDArray[np.float64]
    attention_factor: float = 1.0
    growth: tuple[float, int] | None = None

    def equals(self, other: "Rotation") -> bool:
        """Whether both rotate alike."""
        same = (self.attention_factor, self.growth) == (other.attention_factor, other.growth)
        return same and np.array_equal(self.inv_freq, other.inv_freq)


def rotation_of(head_dim: int, theta: float, scaling: dict | None, max_position_embeddings: int) -> Rotation:
    """The rotation of a model with config.json's ``rope_theta``, ``rope_scaling`` and ``max_position_embeddings``."""
    inv_freq = inverse_frequencies(head_dim, theta, scaling)
    if scaling is not None and scaling["rope_type"] == "yarn":
        return Rotation(inv_freq, attention_factor(scaling))
    if scaling is not None and scaling["rope_type"] == "dynamic":
        return Rotation(inv_freq, growth=(scaling["factor"], max_position_embeddings))
    return Rotation(inv_freq)


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> NDArray[np.float64]:
    """Rotation per position, in radians, of each of the ``head_dim / 2`` pairs; float64 [d / 2].

    scaling: None, or config.json's ``rope_scaling``: ``{"rope_type": "linear", "factor"}``; ``{"rope_type": "yarn",
    "factor", "original_max_position_embeddings"}``, perhaps with beta_fast, beta_slow and truncate; ``{"rope_type":
    "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}``. That of dynamic
    NTK depends on the length of a row, which ``RotaryTables`` knows: these are the ones of a short row.
    """
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = "default" if scaling is None else scaling["rope_type"]
    if scaling is None or kind == "dynamic":
        return inv_freq
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind == "yarn":
        kept_share = yarn_share(head_dim, theta, scaling)
    else:
        # llama3: pairs that turn rarely within the original context are slowed by the factor, those that turn often
        # are kept, and those between are blended, linearly in their number of turns
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (kept_share + (1 - kept_share) / scaling["factor"])


def yarn_share(head_dim: int, theta: float, scaling: dict) -> NDArray[np.float64]:
    """The share of each pair's rotation that YaRN (Peng et al., 2023) keeps, [d / 2]; the rest is slowed by the factor.

    Pairs that turn more than beta_fast times within the original context are kept, those that turn less than
    beta_slow times are slowed, and those between are blended linearly in their index.
    """

    def index(turns: float) -> float:
        # of the pair, a fraction perhaps, that turns so often within the original context
        positions = scaling["original_max_position_embeddings"] / (2 * math.pi * turns)
        return head_dim * math.log(positions) / (2 * math.log(theta))

    first = index(scaling.get("beta_fast") or 32)
    last = index(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    width = min(last, head_dim - 1) - first or 0.001  # transformers' own guard
    return 1.0 - np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)


def attention_factor(scaling: dict) -> float:
    """YaRN's factor on cosine and sine: its own, or that of the paper, or a ratio of two such (DeepSeek's)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["factor"], scaling["mscale"]) / magnitude(scaling["factor"], scaling["mscale_all_dim"])
    return magnitude(scaling["factor"])


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN lengthens queries and keys at a context ``factor`` times the original."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def row_lengths(position_ids: Tensor) -> Tensor:
    """How many tokens each token's row has: position_ids [t], from 0 in each row, rows one after another -> [t]."""
    places = Tensor(np.arange(position_ids.shape[0], dtype=np.int32))
    start = places - position_ids.astype(ms.int32)  # where each token's row begins
    lengths = ops.tensor_scatter_max(ops.zeros_like(places), start.reshape((-1, 1)), position_ids.astype(ms.int32) + 1)
    return ops.gather(lengths, start, 0)


class RotaryTables(nn.Cell):
    """Cosine and sine of every token's rotations, spread over the heads.

    position_ids [t] -> (cos_q, sin_q [t * n_h, d], cos_k, sin_k [t * n_kv, d]). The query's tables carry the
    attention's 1/sqrt(d), and the first half of the sine its minus sign (see ``ops.portable.Rotary``).

    lengths [t]: how many tokens the row of each token has, as far as it is known; it matters to dynamic NTK alone. None
    where position_ids hold whole rows, one after another.

    unrotated: the keys at positions below it are as they are given.
    """

    def __init__(self, head_dim: int, num_heads: int, num_kv_heads: int, rotation: Rotation, dtype: ms.Type):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.inv_freq = Tensor(np.tile(rotation.inv_freq, 2), ms.float32)  # [d]
        self.sign = Tensor(np.repeat([-1.0, 1.0], head_dim // 2), ms.float32)
        self.attention_factor = rotation.attention_factor
        self.scale = head_dim**-0.5
        self.dtype = dtype
        self.grows = rotation.growth is not None
        if rotation.growth is not None:
            self.factor, self.original = rotation.growth
            # the base grows by a ratio to the power d / (d - 2), so that pair i is slowed by it to 2 i / (d - 2)
            exponents = -np.arange(0, head_dim, 2) / (head_dim - 2)
            self.exponents = Tensor(np.tile(exponents, 2), ms.float32)

    def spread(self, table: Tensor, num_heads: int) -> Tensor:
        """[t, d] -> [t * num_heads, d]: a row for every head of every token."""
        return ops.tile(table.astype(self.dtype), (1, num_heads)).reshape((-1, self.head_dim))

    def slowed(self, lengths: Tensor) -> Tensor:
        """Dynamic NTK: the rotation per position in a row of each of ``lengths`` [t] -> [t, d]."""
        ratio = self.factor * (lengths.astype(ms.float32) / self.original) - (self.factor - 1.0)
        return self.inv_freq * ops.pow(ops.maximum(ratio, 1.0).reshape((-1, 1)), self.exponents)

    def construct(
        self, position_ids: Tensor, lengths: Tensor | None = None, unrotated: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inv_freq = self.inv_freq
        if self.grows:
            inv_freq = self.slowed(row_lengths(position_ids) if lengths is None else lengths)
        angles = position_ids.astype(ms.float32).reshape((-1, 1)) * inv_freq  # [t, d]
        cos = ops.cos(angles)
        sin = ops.sin(angles) * self.sign
        if self.attention_factor != 1.0:
            cos = cos * self.attention_factor
            sin = sin * self.attention_factor
        queries = self.spread(cos * self.scale, self.num_heads), self.spread(sin * self.scale, self.num_heads)
        if unrotated > 0:
            rotated = (position_ids >= unrotated).astype(ms.float32).reshape((-1, 1))
            cos, sin = cos * rotated + (1.0 - rotated), sin * rotated
        return queries + (self.spread(cos, self.num_kv_heads), self.spread(sin, self.num_kv_heads))
