"""What a few seeds say of a mean: its 95 % interval, and an exact test of whether it is 0. Pure.

Both are sixty lines here because scipy, which has them, would be 35 MB more for everybody who
installs the coordinator, for nothing else; the tests hold them against scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
# So many values have 2^20 patterns of signs, which are all looked at; of more, so many are drawn.
MOST_EXACT, DRAWN = 20, 2**16


class Estimate(NamedTuple):
    """A mean over seeds, and what is known of it."""

    mean: float
    low: float | None
    """Ends of the 95 % interval, by Student's t; None for one seed."""
    high: float | None
    p: float | None
    """Share of all patterns of signs under which the mean is as far from 0; None for one seed."""
    num_seeds: int

    @property
    def is_known(self) -> bool:
        """Whether it has an interval."""
        return self.low is not None


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, interval and test of at least one value; all is NaN where one of them is."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Estimate(mean, None, None, None, count)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(LEVEL, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, sign_flip_p(values), count)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the two-sided p of a mean of 0, by flipping signs.

    If paired methods were alike, each difference could as well have had the other sign: the test
    counts how often the mean would then be at least as far from 0 (Fisher 1935, Section 21). It
    asks for no normal distribution. With n seeds no p is below 2 / 2^n.
    """
    if not all(map(math.isfinite, values)):
        return math.nan
    if len(values) <= MOST_EXACT:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
    else:
        flips = np.random.default_rng(0).integers(0, 2, (DRAWN, len(values)))
        flips[0] = 0  # what was found is one of the patterns
        sums = (1.0 - 2.0 * flips) @ np.array(values)
    # Equal sums may differ in their last bits by the order of their terms.
    least = abs(sum(values)) * (1 - 1e-9)
    return float(np.mean(np.abs(sums) >= least))


def t_quantile(share: float, freedom: int) -> float:
    """Return t so that *share* of Student's distribution is between -t and t.

    Args:
        share: Above 0 and below 1.
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # each halves the bracket, until floats end
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _share_within(angle: float, freedom: int) -> float:
    """Return the share of Student's distribution within sqrt(freedom) tan(angle) of 0.

    Finite sums for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for step in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine * cosine * step / (step + 1)
    if is_odd:
        return 2.0 / math.pi * (angle + sine * total)
    return sine * total
