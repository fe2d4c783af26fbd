"""A run that blew up: not an error of a comparison but an answer to the rate that was tried."""

from __future__ import annotations

import math
from typing import Any

from coordinator.lab.comparison.cells import Point
from coordinator.lab.comparison.fit_devices import samples_of_a_step
from coordinator.lab.simulation.config import SimulationConfig
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundDone
from coordinator.results.history import LossAccuracy, overall
from edge_sdk.errors import NumericError


class UntrainedScore:
    """Remembers what the model was worth before training; a watcher."""

    def __init__(self) -> None:
        self.score: LossAccuracy | None = None

    def see(self, event: RunEvent) -> None:
        """Take the first evaluation."""
        if isinstance(event, RoundDone) and self.score is None:
            self.score = overall(event.row)


def diverged_parts(
    config: SimulationConfig, before: LossAccuracy | None, error: NumericError
) -> dict[str, Any]:
    """Return what a cell holds of a run that blew up; its loss is no number, nor is what it cost.

    Args:
        config: The run, its devices named singly.
        before: What the untrained model was worth.
        error: How the run ended.

    Raises:
        NumericError: not even the untrained model could be evaluated.
    """
    if before is None:
        raise error
    samples = config.total_steps * samples_of_a_step(config)
    first = Point(0, 0.0, 0.0, 0, 0, before.loss, before.accuracy)
    unknown = [math.nan] * (len(Point._fields) - 1)
    return {
        "points": (first, Point(samples, *unknown)),
        "notes": (f"it diverged at a learning rate of {config.training.learning_rate:g}: {error}",),
        "is_central": config.trained_by == "coordinator",
    }
