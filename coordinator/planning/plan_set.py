"""Plans as values: what everybody runs, the numbers behind it, what changes between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.planning.splits import Binding, Option
from edge_sdk.protocol.plan import Plan


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
