"""How large what was learned can be before something is wrong, and with whom. Pure.

Honest adapters have numbers around 1 and below, and change a weight by less than what it is. The
limits here are far above that: they tell apart what is beyond all measure, not good from bad.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

import numpy as np

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.rules import SERVER
from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Array, Factors, norm

# Largest number of factors or of a head. Products of two of them are far from any overflow.
MAX_NUMBER = 1e4
# Factors above both are not what the others' are: this much, and so many times the others' median.
SUSPICIOUS, TIMES_THE_OTHERS = 10.0, 100.0
# Root mean square of the change of a weight; of a model's weights it is a few hundredths.
MAX_CHANGE = 1.0


def largest(arrays: Iterable[Array]) -> float:
    """Return the largest absolute number; infinite where one is NaN or infinite."""
    found = 0.0
    for array in arrays:
        size = float(np.abs(array).max(initial=0.0))
        if not np.isfinite(size):
            return float("inf")
        found = max(found, size)
    return found


def oversized(reports: Mapping[str, Report]) -> dict[str, str]:
    """Return the devices that have brought what nobody can have learned, each with the reason.

    Raises:
        NumericError: all have, so that no device is to blame: the run has diverged.
    """
    devices = {name: r for name, r in sorted(reports.items()) if name != SERVER}
    factors = {n: largest(a for pair in r.pairs.values() for a in pair) for n, r in devices.items()}
    heads = {name: largest(report.head.values()) for name, report in devices.items()}
    found: dict[str, str] = {}
    for name, size in factors.items():
        others = [other for who, other in factors.items() if who != name]
        usual = median(others) if others else size
        if max(size, heads[name]) > MAX_NUMBER:
            found[name] = f"its upload has numbers up to {max(size, heads[name]):.2g}"
        elif size > max(SUSPICIOUS, TIMES_THE_OTHERS * usual):
            found[name] = f"its upload has numbers up to {size:.2g}, the others' {usual:.2g}"
    if found and len(found) == len(devices):
        raise NumericError(
            f"the run has diverged: every upload of the round has numbers above {MAX_NUMBER:g}; "
            "lower training.learning_rate"
        )
    return found


def is_beyond_measure(factors: Factors) -> bool:
    """Return whether a change of a weight is larger than weights are, or not finite."""
    if largest(factors) == float("inf"):
        return True
    size = factors.b_OR.shape[0] * factors.a_RI.shape[1]
    return bool(norm(factors) > MAX_CHANGE * size**0.5)
