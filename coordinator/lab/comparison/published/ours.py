"""What our own runs have of each measure that a paper publishes. Pure: runs in, a spread out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from coordinator.config.scoring import SCORES
from coordinator.lab.comparison.cells import (
    Point,
    RunResult,
    Spread,
    at_chosen_rates,
    by_group,
    score,
    spread,
)

Of = Callable[[RunResult], float | None]
Against = Callable[[RunResult, RunResult], float | None]


def _perplexity(cell: RunResult) -> float:
    return score(cell.last, is_classifier=False)


def _share(ours: float, theirs: float) -> float | None:
    return 100 * ours / theirs if theirs else None


PLAIN: dict[str, Of] = {
    "loss": lambda cell: cell.last.loss,
    "perplexity": _perplexity,
    "accuracy": lambda cell: score(cell.last, is_classifier=True),
    "traffic": lambda cell: None if cell.is_central else cell.last.traffic_bytes,
    "modelled_s": lambda cell: cell.last.modelled_s,
    "trained": lambda cell: max(cell.trained.values()) if cell.trained else None,
}
AGAINST_REFERENCE: dict[str, Against] = {
    "perplexity_behind": lambda ours, theirs: _perplexity(ours) - _perplexity(theirs),
    "traffic_share": lambda o, t: _share(o.last.traffic_bytes, t.last.traffic_bytes),
    "uplink_share": lambda o, t: _share(o.last.bytes_up, t.last.bytes_up),
}

TO_TARGET: dict[str, Callable[[Point], float]] = {
    "slowdown": lambda point: point.samples,
    "time_ratio": lambda point: point.modelled_s,
}


@dataclass(frozen=True)
class OurValues:
    """The runs of a comparison, each method at its own rate."""

    cells: Sequence[RunResult]
    reference: str
    """The row that shares and multiples are of."""
    target: float
    """Loss that costs are measured to."""

    def of(self, method: str, devices: str, measure: str) -> Spread | None:
        """Return our value over the seeds; None where no run has one."""
        groups = by_group(at_chosen_rates(self.cells))
        own = groups.get((method, devices), [])
        if measure == "perplexity_rise":
            alike = groups.get((method, "homogeneous"), [])
            return _spread(_paired(own, alike, AGAINST_REFERENCE["perplexity_behind"]))
        reference = groups.get((self.reference, devices), [])
        if measure in TO_TARGET:
            of = partial(self._multiple, TO_TARGET[measure])
            return _spread(_paired(own, reference, of))
        if measure in AGAINST_REFERENCE:
            return _spread(_paired(own, reference, AGAINST_REFERENCE[measure]))
        if measure in SCORES:
            return _spread(cell.scores.get(measure) for cell in own)
        return _spread(map(PLAIN[measure], own))

    def _multiple(
        self, cost: Callable[[Point], float], ours: RunResult, theirs: RunResult
    ) -> float | None:
        """Return what *ours* costs to the target, in what *theirs* does."""
        mine, other = ours.reached(self.target), theirs.reached(self.target)
        return cost(mine) / cost(other) if mine and other and cost(other) else None


def _paired(
    ours: Sequence[RunResult], theirs: Sequence[RunResult], of: Against
) -> list[float | None]:
    by_seed = {cell.seed: cell for cell in theirs}
    return [of(cell, by_seed[cell.seed]) for cell in ours if cell.seed in by_seed]


def _spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and deviation where every seed has a number."""
    found = list(values)
    numbers = [value for value in found if value is not None and math.isfinite(value)]
    return spread(numbers) if numbers and len(numbers) == len(found) else None
