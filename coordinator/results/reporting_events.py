"""What can happen to those who tell of a run, as values. The run itself goes on as it would."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.results.events import RunEvent


@dataclass(frozen=True, slots=True)
class TrackerLeftOut(RunEvent):
    """A tracker of `report_to` has failed, hangs, or does not keep up."""

    LINE = "report_to: {0.tracker} is left out from here on: {0.reason}"

    tracker: str
    reason: str
