"""What everybody is to run, and how much each weight matters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator.planning.plan_set import PlanSet
from coordinator.results.events.event import RoundEvent, RunEvent
from edge_sdk.protocol.plan import Plan

# Reasons that a person reads: a fleet has one for each device that has changed.
MOST_REASONS = 12


@dataclass(frozen=True, slots=True)
class ImportanceMeasured(RunEvent):
    """The planner knows how much each weight matters after so many rounds."""

    round: int
    importance: Mapping[str, float]
    """Smoothed global importance by weight."""


@dataclass(frozen=True, slots=True)
class PlanMade(RoundEvent):
    """Devices and coordinator are to run other plans."""

    plans: PlanSet
    reasons: Sequence[str]
    importance: Mapping[str, float]
    """What the ranks were chosen by; empty where nothing is measured."""
    changed: Collection[str] | None = None
    """Devices that are to run something else than before; None: all, as with first plans."""

    @property
    def text(self) -> str:
        """A line for each reason, and one for each new plan."""
        lines = [f"plans from round {self.nth} on: {why}" for why in self.reasons]
        if (more := len(lines) - MOST_REASONS) > 0:
            lines[MOST_REASONS:] = [f"plans from round {self.nth} on: {more:,} more reasons"]
        if self.changed is None or self.changed:
            lines += [f"  {line}" for line in self.plans.lines(self.changed)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class PlanShrunk(RoundEvent):
    """A device could not do its plan, and is to run a smaller one."""

    LINE = "{0.device} {0.reason}"

    device: str
    reason: str
    plans: Mapping[str, Plan]
    """What everybody is to run, by device."""
