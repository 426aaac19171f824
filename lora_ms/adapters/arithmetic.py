"""What each way to combine adapters makes of the tensors of one module, with the arithmetic of PEFT.

A is [r, in], B is [out, r] (of an embedding [r, vocabulary] and [h, r]); an update is ``scaling * B A``, [out, in].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_ms.adapters.methods.base import Pair

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Mix:
    """How tensors of one shape become one; ``method`` is a name of ``combine.COMBINATIONS`` without ``_svd``."""

    method: str
    density: float  # share of values to keep; linear keeps all
    rng: np.random.Generator
    majority_sign_method: str

    def __call__(self, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
        if self.method.startswith("dare"):
            tensors = [dropped(tensor, self.density, self.rng) for tensor in tensors]
        elif self.method != "linear":
            tensors = [trimmed(tensor, self.density) for tensor in tensors]
        if self.method.endswith("ties"):
            return elected(tensors, weights, self.majority_sign_method)
        weighted = (weight * tensor for tensor, weight in zip(tensors, weights, strict=True))
        return sum(weighted, start=np.zeros_like(tensors[0]))


def trimmed(tensor: Array, density: float) -> Array:
    """The share ``density`` of largest magnitudes, the rest zero."""
    kept = int(density * tensor.size)
    order = np.argpartition(-np.abs(tensor), kept - 1, axis=None)
    pruned = np.zeros_like(tensor)
    pruned.flat[order[:kept]] = tensor.flat[order[:kept]]
    return pruned


def dropped(tensor: Array, density: float, rng: np.random.Generator) -> Array:
    """Each value kept with probability ``density`` and scaled up, so that its expectation stays (Yu et al., 2024)."""
    return np.where(rng.random(tensor.shape) < density, tensor / density, 0).astype(tensor.dtype)


def elected(tensors: Sequence[Array], weights: Sequence[float], majority_sign_method: str) -> Array:
    """Mean of the weighted values whose signs are elected, by the values before weighting (Yadav et al., 2023).

    With all weights 1::

        tensor 1     4    -1     0     3
        tensor 2    -2    -3     5     1
        tensor 3    -1     2    -4     0
        total        4    -2     5     2
        frequency   -1.5  -2     5     2
    """
    votes = tensors if majority_sign_method == "total" else [np.sign(tensor) for tensor in tensors]
    sign = np.where(sum(votes) >= 0, 1, -1)
    agree = [np.sign(tensor) == sign for tensor in tensors]
    total = sum(weight * tensor * mask for tensor, weight, mask in zip(tensors, weights, agree, strict=True))
    return total / np.maximum(sum(mask.astype(total.dtype) for mask in agree), 1)


def combined_pair(
    parts: Sequence[Pair], weights: Sequence[float], method: str, rank: int, mix: Mix
) -> tuple[Array, Array]:
    """A and B, to be scaled by 1, of one module, by a name of ``combine.COMBINATIONS``; ``rank``: of an svd method."""
    factors = [weight * scaling for weight, (_, _, scaling) in zip(weights, parts, strict=True)]
    if method in ("cat", "svd"):
        a = np.concatenate([a * factor for factor, (a, _, _) in zip(factors, parts, strict=True)])
        b = np.concatenate([b for _, b, _ in parts], 1)
        if method == "cat":
            return a, b
        # B A = Q (R A), and Q keeps lengths: the best pair of the small R A is the best of B A
        q, r = np.linalg.qr(b)
        a, b = nearest(r @ a, rank)
        return a, q @ b
    if method.endswith("_svd"):
        return nearest(mix([scaling * (b @ a) for a, b, scaling in parts], weights), rank)
    # the root of the factor on both sides, its sign on A's
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return mix([a for a, _, _ in parts], signed), mix([b for _, b, _ in parts], roots)


def nearest(matrix: Array, rank: int) -> tuple[Array, Array]:
    """A and B, of at most ``rank``, with B A as near to ``matrix`` [out, in] as can be, in float64.

    The leading singular vectors of the shorter side are eigenvectors of a square matrix, which are had many times
    faster than a whole singular value decomposition.
    """
    dtype, matrix = matrix.dtype, matrix.astype(np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        a, b = nearest(matrix.T, rank)
        return b.T.astype(dtype), a.T.astype(dtype)
    _, vectors = np.linalg.eigh(matrix @ matrix.T)  # eigenvalues ascend
    b = vectors[:, ::-1][:, :rank]
    return (b.T @ matrix).astype(dtype), b.astype(dtype)


def widened(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The same update with zeros up to ``rank``."""
    more = rank - len(a)
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
