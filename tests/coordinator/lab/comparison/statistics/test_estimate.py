"""Intervals and paired tests: those of scipy, number for number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coordinator.lab.comparison.statistics.estimate import (
    DRAWN,
    LEVEL,
    estimate,
    sign_flip_p,
    t_quantile,
)


@given(st.integers(1, 200), st.floats(0.01, 0.999))
def test_the_quantile_is_that_of_students_distribution(freedom: int, share: float) -> None:
    """For whole degrees of freedom, as there are where seeds are counted."""
    assert t_quantile(share, freedom) == pytest.approx(
        stats.t.ppf(0.5 + share / 2, freedom), rel=1e-9
    )


@given(st.lists(st.integers(-9, 9).map(lambda n: n / 4), min_size=2, max_size=9))
def test_interval_and_p_are_scipys(values: list[float]) -> None:
    """Of a paired t-interval, and of a permutation test that looks at all patterns of signs."""
    found = estimate(values)

    exact = stats.permutation_test(
        (np.array(values),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p == pytest.approx(exact.pvalue)
    if len(set(values)) > 1:  # scipy divides by the deviation
        interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
        assert (found.low, found.high) == pytest.approx(tuple(interval))
    else:
        assert (found.low, found.high) == pytest.approx((values[0], values[0]))


def test_one_seed_has_no_interval() -> None:
    """A mean alone, and no test."""
    assert estimate([0.5]) == (0.5, None, None, None, 1)


def test_few_seeds_can_only_say_little() -> None:
    """Five differences of one sign have p = 2 / 2^5, and no test of signs could find less."""
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 2**5
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_many_seeds_are_sampled() -> None:
    """The same each time, and near to what all patterns would give; never 0."""
    values = [*np.random.default_rng(1).normal(0.4, 1.0, 24).tolist()]
    normal = stats.ttest_1samp(values, 0.0).pvalue

    assert sign_flip_p(values) == sign_flip_p(values) == pytest.approx(normal, abs=0.02)
    assert sign_flip_p([1.0] * 40) == 1 / DRAWN


def test_a_run_that_diverged_leaves_nothing_to_say() -> None:
    """Neither a mean nor an interval nor a test is made up."""
    assert all(map(math.isnan, estimate([1.0, math.nan])[:4]))  # type: ignore[arg-type]
