"""Factored matrices are exactly the dense ones that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.lora.factors import (
    Factors,
    _svd_by_gram,
    compress,
    condense,
    difference,
    stack,
    zero,
)

RANKS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 2**32 - 1)


def random_factors(
    generator: np.random.Generator, size: tuple[int, int], rank: int, scale: float = 1.0
) -> Factors:
    """A random matrix of *rank*, in float32."""
    b_OR = scale * generator.normal(size=(size[0], rank))
    return Factors(b_OR.astype(np.float32), generator.normal(size=(rank, size[1])).astype("f4"))


def dense(term: Factors) -> np.ndarray:
    """The matrix in float64."""
    product: np.ndarray = term.b_OR.astype(np.float64) @ term.a_RI.astype(np.float64)
    return product


@given(RANKS, SIZES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_stack_is_the_sum(ranks: list[int], size: tuple[int, int], seed: int) -> None:
    """Stacked factors of any ranks are the sum of the dense matrices, and their ranks add up."""
    generator = np.random.default_rng(seed)
    terms = [random_factors(generator, size, rank) for rank in ranks]

    total = stack(terms)

    assert total.rank == sum(ranks)
    expected = sum((dense(term) for term in terms), np.zeros(size))
    np.testing.assert_allclose(dense(total), expected, rtol=1e-12, atol=1e-12)


@given(RANKS, SIZES, SEEDS, st.sampled_from([1e-6, 1.0, 1e5]))
@settings(deadline=None, max_examples=60)
def test_compressing_loses_nothing(
    ranks: list[int], size: tuple[int, int], seed: int, scale: float
) -> None:
    """Without a cap the matrix is the same to 1e-6, of the least rank, whatever its scale."""
    generator = np.random.default_rng(seed)
    terms = stack([random_factors(generator, size, rank, scale) for rank in ranks])

    small, error = compress(terms)

    assert error == 0.0
    assert small.rank <= min(*size, sum(ranks))
    assert np.linalg.norm(dense(small) - dense(terms)) <= 1e-6 * np.linalg.norm(dense(terms))
    assert small.b_OR.dtype == small.a_RI.dtype == np.float32


@given(RANKS, SIZES, SEEDS, st.sampled_from([(), (2,)]))
@settings(deadline=None, max_examples=60)
def test_a_condensed_sum_is_the_sum_in_no_more_numbers_than_it_needs(
    ranks: list[int], size: tuple[int, int], seed: int, experts: tuple[int, ...]
) -> None:
    """Above and below the rank of the matrix, stacks of experts included, with ranks to match."""
    generator = np.random.default_rng(seed)
    shapes = [((*experts, size[0], r), (*experts, r, size[1])) for r in ranks]
    terms = [Factors(*(generator.normal(size=s).astype("f4") for s in p)) for p in shapes]
    whole = dense(stack(terms))

    small = condense(terms[0], terms[1:])
    nothing = condense(terms[0], [*terms[1:], *(term.scaled(-1.0) for term in terms)], cancels=True)

    assert small.rank <= min(*size, sum(ranks))
    assert np.linalg.norm(dense(small) - whole) <= 1e-6 * np.linalg.norm(whole)
    assert nothing.rank == 0
    assert small.b_OR.dtype == small.a_RI.dtype == np.float32


@given(st.integers(1, 9), st.integers(0, 9), SIZES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_cap_is_the_best_there_is_and_its_error_is_told(
    rank: int, cap: int, size: tuple[int, int], seed: int
) -> None:
    """A capped matrix is the best one of that rank, and the error is what the cap has cut."""
    term = random_factors(np.random.default_rng(seed), size, rank)
    sigma = np.linalg.svd(dense(term), compute_uv=False)

    small, error = compress(term, max_rank=cap)

    assert small.rank <= cap
    norm = np.linalg.norm(dense(term))
    assert error == pytest.approx(np.linalg.norm(sigma[cap:]) / norm, abs=2e-6)
    assert np.linalg.norm(dense(small) - dense(term)) / norm == pytest.approx(error, abs=2e-6)


@given(st.integers(0, 9), st.integers(0, 9), SIZES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_difference_is_that_of_the_matrices(
    one: int, two: int, size: tuple[int, int], seed: int
) -> None:
    """In no more ranks than the matrix or both terms can have; of equals it has none."""
    generator = np.random.default_rng(seed)
    first, second = (random_factors(generator, size, rank) for rank in (one, two))

    found = difference(first, second)

    expected = dense(first) - dense(second)
    assert dense(found) == pytest.approx(expected, abs=1e-5 * max(1.0, np.abs(expected).max()))
    assert found.rank <= min(*size, one + two)
    assert difference(first, first).rank == 0


def test_a_difference_of_equals_is_of_rank_zero() -> None:
    """What cancels leaves no factors behind."""
    term = random_factors(np.random.default_rng(0), (8, 6), 3)

    small, error = compress(stack([term, term.scaled(-1.0)]), cancels=True)

    assert (small.rank, error) == (0, 0.0)
    assert small.dense().shape == (8, 6)


@given(RANKS, SIZES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_what_does_not_cancel_stays(ranks: list[int], size: tuple[int, int], seed: int) -> None:
    """Of terms that cancel the rest is exact to a few bits of the terms' own float32 rounding."""
    generator = np.random.default_rng(seed)
    large = random_factors(generator, size, 3, scale=100.0)
    rest = stack([random_factors(generator, size, rank) for rank in ranks])

    small, _ = compress(stack([large, rest, large.scaled(-1.0)]), cancels=True)

    size_of_terms = 100.0 * np.sqrt(6.0 * size[0] * size[1]) + np.linalg.norm(dense(rest))
    assert np.linalg.norm(dense(small) - dense(rest)) <= 4e-6 * size_of_terms


def test_both_factors_share_the_singular_values() -> None:
    """Neither factor becomes tiny: both have the same norm, rank by rank."""
    term = random_factors(np.random.default_rng(0), (8, 6), 3, scale=1e-4)

    small, _ = compress(term)

    columns, rows = np.linalg.norm(small.b_OR, axis=0), np.linalg.norm(small.a_RI, axis=1)
    np.testing.assert_allclose(columns, rows, rtol=1e-5)


@pytest.mark.parametrize("max_rank", [None, 0, 2])
def test_nothing_stays_nothing(max_rank: int | None) -> None:
    """The zero matrix has no ranks and no error, whether empty or full of zeros."""
    zeros = Factors(np.zeros((4, 2), np.float32), np.ones((2, 3), np.float32))

    for term in (zero(4, 3), zeros):
        small, error = compress(term, max_rank)
        assert (small.rank, error) == (0, 0.0)
        assert not small.dense().any()


def test_scaling_and_dense_agree() -> None:
    """A scaled pair is the scaled matrix."""
    term = random_factors(np.random.default_rng(0), (5, 4), 2)

    np.testing.assert_allclose(term.scaled(-0.5).dense(), -0.5 * term.dense(), rtol=1e-6)


@pytest.mark.parametrize("size", [1e12, 1e19, 1e25])
def test_what_is_huge_does_not_vanish(size: float) -> None:
    """Squares that float32 cannot hold drop no rank: the matrix stays, term by term."""
    term = random_factors(np.random.default_rng(0), (8, 6), 2)
    huge = Factors(term.b_OR * np.float32(size), term.a_RI)

    small, error = compress(huge, cancels=True)

    assert (small.rank, error) == (2, 0.0)
    np.testing.assert_allclose(dense(small), dense(huge), rtol=1e-4, atol=1e-4 * size)


# Fewer ranks than columns, and rounding in the rest, as sums of factors have it: to OpenBLAS 0.3.31
# the singular values of this matrix do not converge.
DIAGONAL = """
    24 22 24 12 15 21 16 7.4 11 8.4 9.2 8.7 4 3.3 4.1 2.7e-8 2.7e-12 3.4e-12 2.7e-12 3.2e-12 3e-12
    2.7e-12 2.8e-12 2.5e-12 2.4e-12 2.9e-12 2.8e-12 2.3e-12 2.7e-12 2.6e-12 2.2e-12"""
BESIDE = """
    36 31 22 17 27 29 17 16 12 9.8 14 12 13 10 10 1.7e-12 1.5e-12 1.5e-12 1.5e-12 1e-12 1.3e-12
    7.8e-13 6.3e-13 6.9e-13 6.4e-13 8.1e-13 6.3e-13 9.8e-13 4e-13 4e-13"""


def test_a_matrix_that_lapack_gives_up_on_is_compressed() -> None:
    """Whatever LAPACK says of it, what is kept is the matrix, in as many ranks as it has."""
    diagonal, beside = (np.array(text.split(), np.float32) for text in (DIAGONAL, BESIDE))
    matrix = np.diag(diagonal) + np.diag(beside, 1)

    for turned in (matrix, matrix.T):
        found, error = compress(Factors(turned, np.eye(len(turned), dtype=np.float32)))

        assert (found.rank, error) == (15, 0.0)
        assert found.dense() == pytest.approx(turned, abs=1e-5)


@given(st.integers(1, 6), SIZES, SEEDS)
@settings(deadline=None, max_examples=40)
def test_what_serves_in_place_of_lapack_is_as_good(
    rank: int, size: tuple[int, int], seed: int
) -> None:
    """By the Gram matrix singular values and product come out as they do directly."""
    draw = np.random.default_rng(seed)
    matrix = draw.normal(size=(size[0], rank)) @ draw.normal(size=(rank, size[1]))
    matrix = matrix if size[0] >= size[1] else matrix.T

    u, sigma, vt = _svd_by_gram(matrix)

    largest = np.linalg.norm(matrix, 2)
    assert sigma == pytest.approx(np.linalg.svd(matrix)[1], abs=1e-7 * largest)
    assert u * sigma @ vt == pytest.approx(matrix, abs=1e-12 * largest)
