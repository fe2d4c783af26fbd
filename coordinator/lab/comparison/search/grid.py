"""Which learning rate is tried next, and where the best one stands among those that were. Pure.

While the best rate is the lowest or the highest one, the grid grows at that edge; then the gaps
around the best rate are halved on a logarithmic scale. It is the search by hand that papers
describe in one sentence, made repeatable. It assumes that the loss has one valley over the rate: a
second, deeper one outside of the grid is not found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from coordinator.lab.comparison.search.config import RateSearchConfig

Losses = Mapping[float, float]
"""Final loss by rate, at least one."""
Edge = Literal["", "lowest", "highest", "only"]
"""What the best rate is of all that were tried; empty: there is a worse one on both sides."""

USUAL_FACTOR, LEAST_FACTOR = 4.0, 1.5


def best_rate(losses: Losses) -> float:
    """Return the rate with the lowest loss, the lower of two; one that blew up never wins."""
    return min(sorted(losses), key=lambda rate: _finite(losses[rate]))


def edge_of(losses: Losses) -> Edge:
    """Return which edge of the grid the best rate stands at, if any."""
    best = best_rate(losses)
    if len(losses) == 1:
        return "only"
    if best == min(losses):
        return "lowest"
    return "highest" if best == max(losses) else ""


def next_rate(losses: Losses, num_begun: int, search: RateSearchConfig) -> float | None:
    """Return the rate to try next; None: the search has ended.

    Args:
        losses: What was tried until now.
        num_begun: How many of them the search began with.
        search: How far to go.
    """
    if len(losses) - num_begun >= search.most_trials:
        return None
    rates, best = sorted(losses), best_rate(losses)
    match edge_of(losses):
        case "":
            return _between(losses, rates, best, search.finest)
        case "lowest":
            return _rounded(best / (search.factor or max(LEAST_FACTOR, rates[1] / rates[0])))
        case "highest":
            return _rounded(best * (search.factor or max(LEAST_FACTOR, rates[-1] / rates[-2])))
        case "only":
            return _rounded(best * (search.factor or USUAL_FACTOR))


def in_words(losses: Losses) -> str:
    """Return which rate is the best of how many, and what stands beside it."""
    rates, best = sorted(losses), best_rate(losses)
    edge, at = edge_of(losses), rates.index(best)
    if edge == "only":
        return f"learning rate {best:g}, the only one that was tried"
    if edge:
        return f"learning rate {best:g}, the {edge} of {len(rates)} that were tried: not settled"
    return (
        f"learning rate {best:g} of {len(rates)} that were tried, between {rates[at - 1]:g} and "
        f"{rates[at + 1]:g}"
    )


def _between(losses: Losses, rates: list[float], best: float, finest: float) -> float | None:
    """Return the middle of the wider-than-wanted gap on whose other side the loss is lower."""
    at = rates.index(best)
    # Rounded rates may be a little further apart than they were meant to be.
    wide = [
        (_finite(losses[other]), other)
        for other in (rates[at - 1], rates[at + 1])
        if max(best / other, other / best) > finest * 1.01
    ]
    return _rounded(math.sqrt(best * min(wide)[1])) if wide else None


def _rounded(rate: float) -> float:
    """Return a rate that a person can type: three digits that count."""
    return float(f"{rate:.3g}")


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
