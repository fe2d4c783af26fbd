"""What a sweep of rates suggests, on curves of which the answer is known."""

from __future__ import annotations

import math

import pytest

from coordinator.lab.rates.suggestion import (
    SweepPoint,
    has_diverged,
    rates_of,
    smoothed,
    suggest,
)

RATES = rates_of(1e-6, 1.0, 61)


def points(losses: list[float]) -> list[SweepPoint]:
    """A sweep without noise."""
    return [SweepPoint(rate, loss, loss) for rate, loss in zip(RATES, losses, strict=False)]


def valley(rate: float) -> float:
    """A loss that falls fastest at 1e-3 and is lowest at 1e-1."""
    at = math.log10(rate)
    return 4.0 - math.tanh(at + 3.0) + (max(0.0, at + 1.0) ** 2) * 2.0


def test_rates_grow_by_one_factor() -> None:
    """First and last are as given, and each is the same factor above the one before."""
    ratios = [after / before for before, after in zip(RATES, RATES[1:], strict=False)]

    assert (RATES[0], RATES[-1]) == pytest.approx((1e-6, 1.0))
    assert ratios == pytest.approx([10 ** (6 / 60)] * 60)


def test_the_steepest_descent_is_suggested() -> None:
    """On a smooth curve the rate is that at which the loss falls fastest, below the lowest."""
    found = suggest(points([valley(rate) for rate in RATES]), is_whole=True)

    assert found.steepest == pytest.approx(1e-3, rel=0.3)
    assert found.lowest == pytest.approx(0.1, rel=0.5)
    assert found.diverged is None


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    """Where the loss only rises, or falls by less than can be seen, no rate is suggested."""
    rising = suggest(points([4.0 + 0.1 * n for n in range(61)]), is_whole=False)
    flat = suggest(points([4.0 - 0.0001 * n for n in range(61)]), is_whole=True)

    assert (rising.steepest, flat.steepest) == (None, None)
    assert rising.diverged == pytest.approx(1.0)


def test_smoothing_does_not_lag() -> None:
    """A straight line stays what it is, from the first step to the last, and noise becomes less."""
    noisy = smoothed([3.0 + (-1) ** n for n in range(60)])

    assert smoothed([3.0 - 0.1 * n for n in range(60)]) == pytest.approx(
        [3.0 - 0.1 * n for n in range(60)]
    )
    assert abs(noisy[30] - 3.0) < 0.2


def test_a_sweep_ends_where_nothing_good_comes() -> None:
    """A loss that is no number, and one far above the lowest, end a sweep; noise does not."""
    assert has_diverged([4.0, math.nan])
    assert has_diverged([4.0] * 5 + [200.0] * 3)
    assert not has_diverged([4.0, 6.0, 3.0, 7.0])
