"""Optimizer moments of a changed plan: kept wherever they still mean something. Numpy only.

A changed rank keeps the first ranks of an adapter as they are
(`coordinator.aggregation.rules.resize_pair`), so their moments stay theirs; new ranks begin with
none. The scale s = alpha / r changes with the rank and B with it, so that s B A stays; the gradient
of B then grows by s_new / s_old, that of A stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

POWERS = {"exp_avg": 1, "exp_avg_sq": 2}


def fitted(
    moments: Mapping[str, np.ndarray], ranks: Mapping[str, int], scale: Callable[[str, int], float]
) -> dict[str, np.ndarray]:
    """Return the moments of adapters that now have *ranks*.

    Args:
        moments: `<weight>.<A or B>.<moment>` -> value; others are passed on.
        ranks: Rank of each weight from now on.
        scale: (weight, rank) -> s.
    """
    return {key: _fit(key, value, ranks, scale) for key, value in moments.items()}


def _fit(
    key: str,
    value: np.ndarray,
    ranks: Mapping[str, int],
    scale: Callable[[str, int], float],
) -> np.ndarray:
    name, _, moment = key.rpartition(".")
    weight, _, factor = name.rpartition(".")
    axis = {"A": -2, "B": -1}.get(factor)
    if moment not in POWERS or axis is None or weight not in ranks:
        return value
    old, new = value.shape[axis], ranks[weight]
    if old == new:
        return value
    kept = np.take(value, range(min(old, new)), axis)
    missing = [(0, 0)] * value.ndim
    missing[axis] = (0, new - kept.shape[axis])
    ratio = scale(weight, new) / scale(weight, old) if factor == "B" else 1.0
    return np.pad(kept * np.float32(ratio ** POWERS[moment]), missing)
