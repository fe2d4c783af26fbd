"""What is told of a run elsewhere, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.results.events.event import RunEvent


@dataclass(frozen=True, slots=True)
class TrackerLeftOut(RunEvent):
    """A tracker of `report_to` has failed, hangs, or does not keep up."""

    LINE = "report_to: {0.tracker} is left out from here on: {0.reason}"

    tracker: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReportWritten(RunEvent):
    """A run that has ended has its report."""

    LINE = "report: {0.path}"

    path: Path


@dataclass(frozen=True, slots=True)
class ReportFailed(RunEvent):
    """The report of a run could not be made; its result is there all the same."""

    LINE = "no report: {0.reason}"

    reason: str
