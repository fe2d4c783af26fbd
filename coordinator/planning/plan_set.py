"""Plans as values: what everybody runs, the numbers behind it, what changes between rounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator.planning.splits import MIB, Binding, Option
from edge_sdk.protocol.plan import Plan

# Devices that are named in a line, and different plans that have a line each.
MOST_NAMED, MOST_PLANS_TOLD = 5, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExplanation:
    """The numbers behind one device's plan. Memory is in bytes, infinite where unknown."""

    budget_bytes: float
    options: tuple[Option, ...]
    """Every split with the least ranks that let all weights learn."""
    binding: Binding
    """What keeps the device from going deeper."""
    planned_bytes: float
    """Predicted peak bytes with the chosen ranks."""
    adapter_bytes: float
    adapter_budget_bytes: float
    device_s: float | None
    """Its compute and link seconds in a wave; None where unknown."""
    server_s: float | None
    """Seconds that it costs the coordinator in a wave."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerExplanation:
    """The numbers behind the coordinator's share."""

    first: int
    """First block that it trains; the number of blocks where it trains none."""
    budget_bytes: float
    planned_bytes: float
    adapter_bytes: float
    adapter_budget_bytes: float
    server_s: float | None
    """Seconds that a wave takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why the plans are as they are."""

    devices: dict[str, DeviceExplanation]
    server: ServerExplanation
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSet:
    """Plans of all devices, and what they come to."""

    plans: dict[str, Plan]
    server_ranks: dict[str, int]
    """Rank of each of the coordinator's own adapters."""
    refused: dict[str, str]
    """Devices that cannot take part, each with the reason."""
    wave_s: float | None
    """Seconds that a wave takes the slower side; None where a speed or link is unknown."""
    utility: float
    """Importance times the worth of the rank, summed over weights, averaged over devices."""
    explanation: Explanation

    def lines(self, devices: Collection[str] | None = None) -> list[str]:
        """Return what *devices*, or all, and the coordinator are to run, and why, a line each.

        Devices with equal plans share a line.
        """
        alike: dict[str, list[str]] = {}
        for name, plan in self.plans.items():
            if devices is None or name in devices:
                why = _why(self.explanation.devices[name])
                words = f"{_blocks(plan.split)}, {_ranks(plan.ranks.values())}{why}"
                alike.setdefault(words, []).append(name)
        found = [f"{_names(names)}: {words}" for words, names in alike.items()]
        if len(found) > MOST_PLANS_TOLD:
            found = [self._in_short([name for names in alike.values() for name in names])]
        refused = [f"{name}: refused: {reason}" for name, reason in self.refused.items()]
        if (more := len(refused) - MOST_NAMED) > 0:
            refused[MOST_NAMED:] = [f"{more:,} more are refused"]
        found += refused
        server = self.explanation.server
        if self.server_ranks:
            words = f"blocks {server.first + 1} and on, {_ranks(self.server_ranks.values())}"
            found.append(
                f"coordinator: {words}{_memory(server.planned_bytes, server.budget_bytes)}"
            )
        return found

    def _in_short(self, names: Sequence[str]) -> str:
        """Return what *names* are to run, as far as a line can say it of many."""
        own = [self.plans[name] for name in names]
        splits = [plan.split for plan in own]
        ranks = _ranks([rank for plan in own for rank in plan.ranks.values()])
        blocks = f"the first {min(splits)} to {max(splits)} blocks"
        where = "`coordinator status RUN --all` lists them"
        return f"{len(names):,} devices: {blocks}, {ranks}; {where}"


def _blocks(split: int) -> str:
    return "the first block" if split == 1 else f"the first {split} blocks"


def _ranks(ranks: Collection[int]) -> str:
    least, most = min(ranks, default=0), max(ranks, default=0)
    if not most:
        return "frozen"
    return f"rank {most}" if least == most else f"ranks {least} to {most}"


def _why(story: DeviceExplanation) -> str:
    bound = {"fixed": "by hand", "all blocks": "all there are"}
    why = bound.get(story.binding, f"bound by {story.binding}")
    return f" ({why}){_memory(story.planned_bytes, story.budget_bytes)}"


def _memory(needs: float, budget: float) -> str:
    if not math.isfinite(budget):
        return f", {needs / MIB:,.0f} MiB"
    return f", {needs / MIB:,.0f} of {budget / MIB:,.0f} MiB"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What holds from now on, and why."""

    plans: PlanSet
    is_new: bool
    reasons: tuple[str, ...]
    """Why a new plan was made, and why it was taken or not; empty where none was due."""


def changed(old: Mapping[str, Plan], new: Mapping[str, Plan]) -> list[str]:
    """Return the devices whose plan is another one now."""
    return sorted(d for d, plan in new.items() if d in old and old[d] != plan)
