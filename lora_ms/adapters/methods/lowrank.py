"""The formulas of the LoRA family in NumPy: how A and B are initialised, and the merged weight.

Weights are [out, in], A [rank, in], B [out, rank], in PEFT's layout; everything is computed in float32.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def scaling_of(lora_rank: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
    return lora_alpha / (lora_rank**0.5 if use_rslora else lora_rank)


def row_norms(weight: Array) -> Array:
    """Euclidean length of each row: [out, in] -> [out]."""
    return np.sqrt(np.square(weight, dtype=np.float32).sum(1))


def merged_weight(weight: NDArray, a: Array, b: Array, scaling: float, magnitude: Array | None = None) -> Array:
    """``W + scaling B A`` [out, in]; with DoRA's ``magnitude`` [out], each row brought to that length."""
    merged = weight.astype(np.float32) + np.float32(scaling) * (b @ a)
    if magnitude is not None:
        merged *= (magnitude / row_norms(merged))[:, None]
    return merged


def principal_factors(weight: Array, rank: int, iterations: int | None, rng: np.random.Generator) -> tuple[Array, ...]:
    """U [out, rank], singular values [rank] and V [rank, in] of the ``rank`` largest singular values.

    Exact where ``iterations`` is None; else by that many power iterations on a random subspace (Halko et al., 2011).
    """
    if iterations is None:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    basis = np.linalg.qr(weight @ rng.standard_normal((weight.shape[1], rank), np.float32))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight.T @ basis)[0]
        basis = np.linalg.qr(weight @ basis)[0]
    u, s, v = np.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, v


def initial_factors(
    init: str, weight: NDArray, rank: int, scaling: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank] at the start of training, by PEFT's ``init_lora_weights``.

    ``gaussian``: A normal with deviation 1 / rank, B zero. ``orthogonal``: A and B of orthogonal, hence cancelling,
    halves of a random rotation. ``pissa`` (Meng et al., 2024; ``pissa_niter_N`` in its fast form) and ``olora``
    (Büyükakyüz, 2024): the weight's own leading part, which the caller subtracts from the weight.
    """
    out_features, in_features = weight.shape
    if init == "gaussian":
        a = rng.standard_normal((rank, in_features), np.float32) / np.float32(rank)
        return a, np.zeros((out_features, rank), np.float32)
    if init == "orthogonal":
        rotation = np.linalg.qr(rng.standard_normal((rank, rank)))[0].astype(np.float32)
        a = rotation[0::2].T @ rng.standard_normal((rank // 2, in_features), np.float32)
        b = rng.standard_normal((out_features, rank // 2), np.float32) @ rotation[1::2]
        return a / 10, b / 10
    weight = weight.astype(np.float32)
    if init == "olora":
        q, r = np.linalg.qr(weight)
        return np.ascontiguousarray(r[:rank]), np.ascontiguousarray(q[:, :rank])
    iterations = int(init.removeprefix("pissa_niter_")) if init.startswith("pissa_niter_") else None
    u, s, v = principal_factors(weight, rank, iterations, rng)
    root = np.sqrt(s / np.float32(scaling))
    return np.ascontiguousarray(root[:, None] * v), np.ascontiguousarray(u * root)


EXACT = 1024  # numbers of the smaller side up to which directions are found exactly


def leading_directions(inputs: Array, count: int) -> tuple[Array, Array]:
    """The principal directions [count, in] of ``inputs`` [tokens, in], and each one's share of the variance [count]."""
    centred = inputs - inputs.mean(0)
    count = min(count, *centred.shape)
    iterations = None if min(centred.shape) <= EXACT else 4
    _, s, v = principal_factors(centred, count, iterations, np.random.default_rng(0))
    return np.ascontiguousarray(v), np.square(s) / max(float(np.square(centred).sum()), 1e-30)


def ranks_by_share(shares: Mapping[str, Array], budget: int) -> dict[str, int]:
    """How many directions each module keeps, when the ``budget`` largest shares of all are kept; by module."""
    names = [name for name, values in shares.items() for _ in values]
    order = np.argsort(-np.concatenate(list(shares.values())), kind="stable")[:budget]
    found = dict.fromkeys(shares, 0)
    for index in order:
        found[names[index]] += 1
    return found


def error_factors(error: Array, rank: int) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank] of LoftQ (Li et al., 2023) after one step: the best of their rank for ``error``
    [out, in], what quantisation took from a weight. As in PEFT, whatever the scaling is."""
    u, s, v = principal_factors(error, rank, None, np.random.default_rng(0))
    root = np.sqrt(s)
    return np.ascontiguousarray(root[:, None] * v), np.ascontiguousarray(u * root)


DAMPING = 0.01  # added to the diagonal of a second moment, as a share of its mean: PEFT's first try


def damped_second_moment(inputs: Array) -> NDArray[np.float64]:
    """``X^T X`` [in, in] of ``inputs`` [tokens, in], scaled as in PEFT, with ``DAMPING``."""
    scaled = inputs.astype(np.float64) / max(abs(float(inputs.max())), 1e-30)
    found = scaled.T @ scaled
    found[np.diag_indices_from(found)] += DAMPING * np.trace(found) / len(found)
    return found


def oriented_factors(
    weight: Array, second_moment: NDArray[np.float64], rank: int, scaling: float, least: bool
) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank] of CorDA (Yang et al., 2024): ``scaling B A`` is the part of W [out, in] that acts
    most, or ``least``, on inputs of this second moment C [in, in]: by the singular values of W C, without C again."""
    product = weight.astype(np.float64) @ second_moment
    exact = least or min(product.shape) <= EXACT
    kept = min(product.shape) if least else rank
    u, s, v = principal_factors(product, kept, None if exact else 4, np.random.default_rng(0))
    u, s, v = u[:, -rank:], s[-rank:], v[-rank:]  # all of them, where they are the leading ones
    without = np.linalg.solve(second_moment, v.T).T  # C is symmetric
    root = np.sqrt(s / scaling)
    return (root[:, None] * without).astype(np.float32), (u * root).astype(np.float32)


STABLE_GAMMA = 16.0  # PEFT's


def gradient_factors(gradient: Array, rank: int) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank] of LoRA-GA (Wang et al., 2024), as PEFT has it by default (ArB2r, stable): A are
    the leading directions of the gradient [out, in], B the next ones by their singular values, times
    ``out^(1/4) / STABLE_GAMMA^(1/2)``. (The paper has no singular values there, and that factor on A, too.)"""
    exact = min(gradient.shape) <= EXACT
    count = 2 * rank if exact else min(4 * rank, *gradient.shape)  # more than are kept, for accuracy
    u, s, v = principal_factors(gradient, count, None if exact else 4, np.random.default_rng(0))
    factor = np.float32(len(gradient) ** 0.25 / STABLE_GAMMA**0.5)
    return np.ascontiguousarray(v[:rank]), np.ascontiguousarray(u[:, rank : 2 * rank] * s[rank : 2 * rank] * factor)


def changes_weight(init: str) -> bool:
    """Whether the initial update is subtracted from the weight."""
    return init.startswith("pissa") or init in ("olora", "corda", "lora_ga")


def difference(a: Array, b: Array, initial_a: Array, initial_b: Array) -> tuple[Array, Array]:
    """``B A - B0 A0`` as one pair of twice the rank: what a trained PiSSA, say, adds to the untouched weight."""
    return np.concatenate((a, initial_a)), np.concatenate((b, -initial_b), 1)
