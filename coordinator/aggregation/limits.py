"""How large what was learned can be before something is wrong, and with whom. Pure.

The weights of a model have a root mean square of a few hundredths, and honest adapters change them
by less than that. The limits here are far above: they tell what is beyond all measure, not what is
good from what is bad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

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
    # Cheaper, and never less.
    bound = math.prod(float(np.linalg.norm(array.astype(np.float64))) for array in factors)
    return bool(bound > allowed and norm(factors) > allowed)
