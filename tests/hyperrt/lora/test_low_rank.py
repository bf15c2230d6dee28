"""A product of a smaller rank: as near as the truncated SVD of the product written out."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.lora.low_rank import truncated

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((60, 6)), RNG.standard_normal((6, 40))
FALLING = 10.0 ** -np.arange(0, 12, 2)
CASES = {
    "random": (A, B),
    "wide scales": (A * FALLING, B / FALLING[:, None]),
    "falling": (A * FALLING, B),
    "columns alike": (np.repeat(A[:, :1], 6, 1), B),
    "zero columns": (A * [1, 1, 0, 0, 0, 0], B),
    "tiny": (A * 1e-20, B * 1e-20),
    "more columns than rows": (A[:3], B[:, :2]),
}


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_nothing_of_that_rank_is_nearer(case, rank):
    a, b = CASES[case]
    new_a, new_b = truncated(a, b, rank)
    assert (new_a.shape, new_b.shape) == ((len(a), rank), (rank, b.shape[1]))
    values = np.linalg.svd(a @ b, compute_uv=False)
    missing, least = np.linalg.norm(a @ b - new_a @ new_b), np.linalg.norm(values[rank:])
    assert missing == pytest.approx(least, rel=1e-9, abs=1e-12 * values[0])


def test_only_small_matrices_are_decomposed(monkeypatch):
    seen = []
    for name in ("qr", "svd", "eigh"):

        def spy(matrix, plain=getattr(np.linalg, name), **options):  # noqa: B008
            seen.append(matrix.shape)
            return plain(matrix, **options)

        monkeypatch.setattr(np.linalg, name, spy)
    truncated(A, B, 2)
    assert set(seen) == {(6, 6)}


def test_a_rank_that_is_enough_keeps_the_product():
    new_a, new_b = truncated(A, B, 6)
    np.testing.assert_allclose(new_a @ new_b, A @ B, atol=1e-12)


def test_scale_is_shared_by_both_factors_and_rank_not_needed_is_zero():
    a, b = truncated(np.array([[100.0], [0.0]]), np.array([[0.0, 0.01, 0.0]]), 3)
    assert (a.shape, b.shape) == ((2, 3), (3, 3))
    assert np.linalg.norm(a) == pytest.approx(1) and np.linalg.norm(b) == pytest.approx(1)
    assert not a[:, 1:].any() and not b[1:].any()


@pytest.mark.parametrize("zero", [(0, 1), (1, 0), (0, 0)])
def test_nothing_stays_nothing(zero):
    a, b = truncated(A * zero[0], B * zero[1], 2)
    assert not a.any() and not b.any()


def test_a_rank_far_above_the_sizes_takes_no_more_memory_than_the_factors():
    """A Gram matrix of this rank would have 80 GB."""
    a, b = np.ones((2, 100_000)), np.ones((100_000, 3))
    new_a, new_b = truncated(a, b, 1)
    assert np.allclose(new_a @ new_b, a @ b)
