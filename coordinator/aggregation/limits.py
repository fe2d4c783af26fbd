"""How large what was learned can be before something is wrong, and with whom. Pure.

The weights of a model have a root mean square of a few hundredths, and honest adapters change them
by less than that. The limits here are far above: they tell what is beyond all measure, not what is
good from what is bad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.rules import SERVER
from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Array, Factors, norm

# Largest absolute number of factors and heads.
MAX_NUMBER = 1e4
# Largest root mean square of B A that a device may bring of a weight.
MAX_UPLOAD = 10.0
# The same of dW, all that a run has learned of a weight.
MAX_LEARNED = 100.0


def largest(arrays: Iterable[Array]) -> float:
    """Return the largest absolute number; infinite where one is NaN or infinite."""
    sizes = [float(np.abs(array).max(initial=0.0)) for array in arrays]
    return max(sizes, default=0.0) if np.isfinite(sizes).all() else float("inf")


def exceeds(factors: Factors, most: float) -> bool:
    """Return whether the root mean square of a matrix is above *most*, or not finite."""
    if largest(factors) > MAX_NUMBER:
        return True
    *rows, _ = factors.b_OR.shape  # (O,), or (E, O) of a stack
    allowed = most * float(np.sqrt(math.prod(rows) * factors.a_RI.shape[-1]))
    bound = np.linalg.norm(factors.b_OR) * np.linalg.norm(factors.a_RI)  # cheaper, and never less
    return bool(bound > allowed and norm(factors) > allowed)


def oversized(reports: Mapping[str, Report]) -> dict[str, str]:
    """Return the devices that have brought what nobody can have learned, each with the reason.

    Raises:
        NumericError: several devices have, and nobody else: the run has diverged.
    """
    devices = sorted(reports.keys() - {SERVER})
    found = {name: why for name in devices if (why := _what_is_wrong(reports[name]))}
    if 1 < len(found) == len(devices):
        raise NumericError(
            f"the run has diverged, as all uploads of the round show ({devices[0]}: "
            f"{found[devices[0]]}); lower training.learning_rate"
        )
    return found


def _what_is_wrong(report: Report) -> str:
    for weight, (a_RI, b_OR) in report.pairs.items():
        if exceeds(Factors(b_OR, a_RI), MAX_UPLOAD):
            size = largest((a_RI, b_OR))
            return f"its upload changes {weight} beyond all measure, by numbers up to {size:.2g}"
    size = largest(report.head.values())
    return f"its upload of the head has numbers up to {size:.2g}" if size > MAX_NUMBER else ""
