"""What differences are taken of. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from coordinator.lab.comparison.cells import RunResult, score

POINTS, PERCENT = 1.0, 0.01


class Measure(NamedTuple):
    """A quantity of a run, and how its difference to another run's is written."""

    key: str
    """Name in CSV files."""
    title: str
    """Name for a reader, with the unit of the difference."""
    of: Callable[[RunResult], float]
    digits: int
    is_relative: bool = False
    """Whether the difference is a share of the other run's value."""

    def difference(self, ours: RunResult, theirs: RunResult) -> float:
        """Return how much more *ours* has of it than *theirs*."""
        mine, other = self.of(ours), self.of(theirs)
        return mine / other - 1.0 if self.is_relative else mine - other

    @property
    def unit(self) -> float:
        """What a reader's unit is worth."""
        return PERCENT if self.is_relative else POINTS


def measures(*, is_classifier: bool) -> tuple[Measure, ...]:
    """Return what differences are taken of: loss, and perplexity or accuracy."""

    def found(cell: RunResult) -> float:
        return score(cell.last, is_classifier=is_classifier)

    loss = Measure("loss", "loss", lambda cell: cell.last.loss, 4)
    if is_classifier:
        return loss, Measure("accuracy", "accuracy (points)", found, 2)
    return loss, Measure("perplexity", "perplexity (%)", found, 2, is_relative=True)
