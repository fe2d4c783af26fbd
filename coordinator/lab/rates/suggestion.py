"""What a sweep of rates says: smoothed losses, and which rate they suggest. Pure.

The sweep is that of Smith (arXiv 1506.01186, Section 3.3), ended as in fastai; the rate that is
suggested is the one at which the loss falls fastest. fastai smooths with a mean of what came
before, which lags behind and so suggests higher rates; here it is a mean of both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# How much of the mean of earlier losses stays with each step, where the sweep may have to end.
SMOOTHING = 0.9
# The sweep ends where the smoothed loss is so many times the lowest, as in fastai.
DIVERGED = 4.0
# A loss that has fallen by less than this share has not been seen to fall.
LEAST_FALL = 0.01
# Steps over which losses are smoothed, and a slope is taken, on each side, as a share of all.
SIDE_SHARE = 0.05


@dataclass(frozen=True)
class SweepPoint:
    """A step of the sweep."""

    rate: float
    loss: float
    """Mean over the targets of its batch, before the step."""
    smoothed: float
    """Mean of that over the steps around it."""


@dataclass(frozen=True)
class Suggestion:
    """What a sweep says."""

    steepest: float | None
    """The rate at which the loss falls fastest; None where it has not fallen."""
    lowest: float
    """The rate at which the loss is lowest."""
    diverged: float | None
    """The rate at which the sweep ended before its last step; None where it did not."""


def rates_of(first: float, last: float, steps: int) -> list[float]:
    """Return *steps* rates from *first* to *last*, each the same factor above the one before."""
    ratio = (last / first) ** (1.0 / (steps - 1))
    return [first * ratio**step for step in range(steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the mean of *losses* around each, over as many on both sides as there are."""
    found, last = [], len(losses) - 1
    for at in range(len(losses)):
        side = min(_side(len(losses)), at, last - at)
        around = losses[at - side : at + side + 1]
        found.append(sum(around) / len(around))
    return found


def _side(count: int) -> int:
    return max(1, round(SIDE_SHARE * count))


def _means(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean of *losses* up to each, corrected for its beginning."""
    found, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss
        found.append(mean / (1.0 - SMOOTHING**number))
    return found


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the last loss says that nothing good comes of higher rates."""
    found = _means(losses)
    return not math.isfinite(losses[-1]) or found[-1] > DIVERGED * min(found)


def suggest(points: Sequence[SweepPoint], *, is_whole: bool) -> Suggestion:
    """Return what a sweep says.

    Args:
        points: Its steps, at least three.
        is_whole: Whether it came to its last rate.
    """
    values = [point.smoothed for point in points]
    low = min(range(len(values)), key=values.__getitem__)
    diverged = None if is_whole else points[-1].rate
    lowest = points[low].rate
    highest_before = max(values[: low + 1])
    if highest_before - values[low] < LEAST_FALL * highest_before:
        return Suggestion(None, lowest, diverged)
    reach = _side(len(values))
    places = range(reach, max(reach + 1, low + 1))
    slopes = {at: _slope(points, at, reach) for at in places if at < len(points)}
    steepest = min(slopes, key=slopes.__getitem__)
    return Suggestion(points[steepest].rate, lowest, diverged)


def _slope(points: Sequence[SweepPoint], at: int, reach: int) -> float:
    """Return how the smoothed loss changes with the logarithm of the rate."""
    before, after = points[max(0, at - reach)], points[min(len(points) - 1, at + reach)]
    return (after.smoothed - before.smoothed) / math.log(after.rate / before.rate)
