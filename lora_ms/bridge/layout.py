"""Matrices that MindFormers keeps as one: in which order the rows of the parts stand in the whole.

An order [rows] lists rows of the parts, one below the other; ``whole = parts[order]``, ``parts[order] = whole``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError

Order = NDArray[np.intp]


@dataclass(frozen=True)
class Heads:
    """Attention sizes of a model.

    contiguous: the parts stand one below the other; else q, k and v group by group of query heads that share a key
        head, and gate and up row by row in turn.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    contiguous: bool = False

    def order(self, module: str, rows: int) -> Order:
        """The order of the fused ``module`` (``…qkv_proj`` or ``…gate_up_proj``) of ``rows`` rows in all.

        Raises:
            LoraMsError: the rows are not those of these heads.
        """
        if module.endswith("qkv_proj"):
            q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            if rows != q + 2 * kv:
                raise LoraMsError(
                    f"{module} has {rows} rows; {self.num_heads} heads and {self.num_kv_heads} key heads of "
                    f"{self.head_dim} make {q + 2 * kv}: give the right model"
                )
            if not self.contiguous:
                parts = (np.arange(q), np.arange(q, q + kv), np.arange(q + kv, rows))
                return np.concatenate([part.reshape(self.num_kv_heads, -1) for part in parts], 1).reshape(-1)
        elif rows % 2:
            raise LoraMsError(f"{module} has {rows} rows, which are no two halves")
        elif not self.contiguous:
            return np.arange(rows).reshape(2, -1).T.reshape(-1)
        return np.arange(rows)

    def heights(self, module: str, rows: int) -> tuple[int, ...]:
        """Rows of each part of the fused ``module``."""
        if module.endswith("qkv_proj"):
            return self.num_heads * self.head_dim, *2 * (self.num_kv_heads * self.head_dim,)
        return rows // 2, rows // 2


def inverse(order: Order) -> Order:
    """The order that undoes ``order``."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


def heads_of(hf: dict, where: object, contiguous: bool = False) -> Heads:
    """The sizes in a parsed config.json."""
    try:
        heads = hf["num_attention_heads"]
        width = hf.get("head_dim") or hf["hidden_size"] // heads
        return Heads(heads, hf.get("num_key_value_heads") or heads, width, contiguous)
    except KeyError as key:
        raise LoraMsError(f"{where}: {key} is missing") from None
