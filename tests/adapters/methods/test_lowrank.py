"""Where factors start, and what an adapter amounts to: in NumPy against float64 and the methods' own properties."""

import numpy as np
import pytest

from lora_ms.adapters.methods import lowrank

OUT, IN, RANK = 12, 10, 4


def weight(*singular_values: float) -> np.ndarray:
    """[out, in] with these singular values, or a random one."""
    rng = np.random.default_rng(0)
    if not singular_values:
        return rng.standard_normal((OUT, IN), np.float32)
    u = np.linalg.qr(rng.standard_normal((OUT, IN)))[0]
    v = np.linalg.qr(rng.standard_normal((IN, IN)))[0]
    return (u * singular_values @ v).astype(np.float32)


def start(init: str, w: np.ndarray, rank: int = RANK, scaling: float = 1.5, seed: int = 1):
    return lowrank.initial_factors(init, w, rank, scaling, np.random.default_rng(seed))


def near(found: np.ndarray, wanted: np.ndarray, atol: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("rank", "alpha", "use_rslora", "scaling"),
    [(4, 8.0, False, 2.0), (4, 8.0, True, 4.0), (16, 4.0, False, 0.25), (16, 4.0, True, 1.0)],
)
def test_scaling(rank, alpha, use_rslora, scaling):
    assert lowrank.scaling_of(rank, alpha, use_rslora) == scaling


def test_merged_weight():
    """A row of 3 and 4 has length 5; DoRA brings it to its magnitude, sign included."""
    w, a, b = (np.array(rows, np.float32) for rows in ([[1, 0], [3, 4]], [[1, 2]], [[1], [0]]))
    near(lowrank.merged_weight(w, a, b, 2.0), np.array([[3, 4], [3, 4]]))
    near(lowrank.merged_weight(w, a, b, 2.0, np.array([10, -5])), np.array([[6, 8], [-3, -4]]))
    near(lowrank.row_norms(w), np.array([1, 5]))
    assert lowrank.merged_weight(w.astype(np.float16), a, b, 2.0).dtype == np.float32


def test_gaussian_has_deviation_one_over_the_rank_and_changes_nothing():
    a, b = start("gaussian", np.zeros((3, 5000), np.float32))
    assert a.shape == (RANK, 5000) and b.shape == (3, RANK)
    np.testing.assert_allclose([a.std(), a.mean() + 1], [1 / RANK, 1], rtol=0.02)
    np.testing.assert_array_equal(b, 0)


def test_orthogonal_factors_cancel_though_neither_is_zero():
    a, b = start("orthogonal", weight())
    assert a.shape == (RANK, IN) and b.shape == (OUT, RANK)
    assert np.abs(a).min() > 0 and np.abs(b).min() > 0
    near(b @ a, np.zeros((OUT, IN)), 1e-7)
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == RANK // 2
    wide = start("orthogonal", np.zeros((3000, 4000), np.float32))
    # a row of A, and a column of B, is a unit vector's share of normal numbers a tenth as large
    rotation_share = np.sqrt(RANK // 2 / RANK)
    np.testing.assert_allclose([factor.std() for factor in wide], 0.1 * rotation_share, rtol=0.05)


@pytest.mark.parametrize("scaling", [0.5, 1.5])
def test_pissa_starts_from_the_leading_part(scaling):
    w = weight()
    a, b = start("pissa", w, scaling=scaling)
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    near(scaling * b @ a, (u[:, :RANK] * s[:RANK]) @ v[:RANK])
    # what is left has the other singular values, and with the start it is the weight
    rest = lowrank.merged_weight(w, a, b, -scaling)
    near(np.linalg.svd(rest, compute_uv=False)[: IN - RANK], s[RANK:])
    near(rest + np.float32(scaling) * b @ a, w)
    # both factors get the same share of each singular value
    for factor in (np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)):
        near(factor, np.sqrt(s[:RANK] / scaling))


def test_pissa_by_iterations_comes_near_the_exact_one():
    w = weight(9, 7, 5, 4, 2.5, 2, 1, 0.5, 0.1, 0.1)
    a, b = start("pissa", w)
    gaps = []
    for iterations in (1, 4, 16):
        fast_a, fast_b = start(f"pissa_niter_{iterations}", w)
        gaps.append(np.abs(fast_b @ fast_a - b @ a).max())
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]
    assert gaps[2] < 1e-5


def test_olora_starts_from_the_first_columns_of_qr():
    w = weight()
    a, b = start("olora", w)
    near(b.T @ b, np.eye(RANK))
    near(a, b.T @ w)
    near(b @ a[:, :RANK], w[:, :RANK])  # Q R is exact in the first columns
    near(np.tril(a[:, :RANK], -1), np.zeros((RANK, RANK)))
    assert lowrank.initial_factors("olora", w.astype(np.float16), RANK, 1.5, None)[0].dtype == np.float32


@pytest.mark.parametrize(
    ("init", "changes_weight"),
    [("gaussian", False), ("orthogonal", False), ("pissa", True), ("pissa_niter_3", True), ("olora", True)],
)
def test_every_start_follows_its_seed_alone(init, changes_weight):
    assert lowrank.changes_weight(init) == changes_weight
    first, again, other = (start(init, weight(), seed=seed) for seed in (1, 1, 2))
    for i in (0, 1):
        assert first[i].dtype == np.float32 and first[i].flags.c_contiguous
        np.testing.assert_array_equal(first[i], again[i])
    random = init in ("gaussian", "orthogonal", "pissa_niter_3")
    assert np.array_equal(first[0], other[0]) != random


def test_difference():
    rng = np.random.default_rng(2)
    (a, a0), (b, b0) = (rng.standard_normal((2, *shape)) for shape in ((RANK, IN), (OUT, RANK)))
    wide_a, wide_b = lowrank.difference(a, b, a0, b0)
    assert wide_a.shape == (2 * RANK, IN) and wide_b.shape == (OUT, 2 * RANK)
    near(wide_b @ wide_a, b @ a - b0 @ a0, 1e-12)
    np.testing.assert_array_equal(wide_a[:RANK], a)
    np.testing.assert_array_equal(wide_b[:, :RANK], b)
