"""What a run would take: memory, time and bytes by the planner's estimates, and nothing is run.

Pure. Batches count as full, with sequences as long as the run takes them: all of it is the most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.planning.costs import codec_of, link_seconds
from coordinator.planning.objective import bytes_by_base
from coordinator.planning.plan_set import PlanSet
from coordinator.planning.problem import PlanningProblem
from edge_sdk.lora.targets import Shape
from edge_sdk.model.precision import Base
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile

# A link on which the seconds of one direction are its bytes, and the other takes next to none.
_AT_ONCE = 1e17
_ONE_WAY = {
    "up": DeviceProfile(up_bytes_per_s=1.0, down_bytes_per_s=_AT_ONCE),
    "down": DeviceProfile(up_bytes_per_s=_AT_ONCE, down_bytes_per_s=1.0),
}
# Factors of adapters travel as float32.
_FACTOR_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceForecast:
    """What a run would take of one device."""

    split: int
    needs_bytes: float
    """Predicted peak of its process; without what its libraries take where no profile says that."""
    budget_bytes: float
    """What it offers, infinite where unknown."""
    up_bytes: float
    """Hidden states and adapters of the whole run."""
    down_bytes: float
    own_s: float | None
    """Seconds of its own computing and of its link in the whole run; None where unknown."""
    unknown: tuple[str, ...]
    """Fields of its profile without which its time is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run would take."""

    devices: dict[str, DeviceForecast]
    refused: dict[str, str]
    server_needs_bytes: float
    server_budget_bytes: float
    server_bases: Mapping[Base, float]
    """What the coordinator would need in each base, with the same plans."""
    run_s: float | None
    """Seconds of the whole run, evaluations left out; None where something is unknown."""
    unknown: tuple[str, ...]
    """What is unknown of the run's time, with what would tell it."""


def forecast(problem: PlanningProblem, found: PlanSet) -> Forecast:
    """Return what the plans *found* for a problem come to over all of its rounds."""
    devices = {name: _device(problem, found, name) for name in found.plans}
    unknown = [_missing(name, own.unknown) for name, own in devices.items() if own.unknown]
    if any(own.split < problem.num_blocks for own in devices.values()) and (
        problem.server_speed is None
    ):
        unknown.append(
            "the coordinator's speed, which it measures when it serves; `profiler measure --write "
            "here.json` and --coordinator here.json tell it, or --coordinator BOARD"
        )
    steps = problem.config.total_steps
    waves = max((_waves(plan) for plan in found.plans.values()), default=0.0)
    server = found.explanation.server
    return Forecast(
        devices=devices,
        refused=dict(found.refused),
        server_needs_bytes=server.planned_bytes,
        server_budget_bytes=server.budget_bytes,
        server_bases=bytes_by_base(
            problem, {name: plan.split for name, plan in found.plans.items()}, found.server_ranks
        ),
        run_s=None if found.wave_s is None or unknown else found.wave_s * waves * steps,
        unknown=tuple(unknown),
    )


def _missing(name: str, fields: tuple[str, ...]) -> str:
    """Say what is not known of a device, and what would tell it."""
    parts = []
    if "flops_per_s" in fields:
        parts.append(
            f"speed, which it measures when it joins; `profiler measure --write {name}.json` and "
            f"--profiles {name}.json tell it, or --board {name}:BOARD"
        )
    if "up_bytes_per_s" in fields or "down_bytes_per_s" in fields:
        parts.append(f"link, which is measured when it joins; --link {name}:LINK assumes one")
    return f"{name}'s {'; and its '.join(parts)}"


def _device(problem: PlanningProblem, found: PlanSet, device: str) -> DeviceForecast:
    plan, story = found.plans[device], found.explanation.devices[device]
    waves = _waves(plan) * problem.config.total_steps
    adapters = _factor_bytes(plan.ranks, problem.facts.targets) * problem.config.rounds
    profile = problem.profile(device)
    needed = ["flops_per_s"]
    needed += ["up_bytes_per_s", "down_bytes_per_s"] if plan.split < problem.num_blocks else []
    return DeviceForecast(
        split=plan.split,
        needs_bytes=story.planned_bytes,
        budget_bytes=story.budget_bytes,
        up_bytes=wave_bytes(problem, device, plan, "up") * waves + adapters,
        down_bytes=wave_bytes(problem, device, plan, "down") * waves + adapters,
        own_s=None if story.device_s is None else story.device_s * waves,
        unknown=tuple(name for name in needed if getattr(profile, name) is None),
    )


def wave_bytes(problem: PlanningProblem, device: str, plan: Plan, way: str) -> int:
    """Return the most bytes of tensors that a micro-batch sends *way*: `up` or `down`."""
    if plan.split == problem.num_blocks:
        return 0
    codec = codec_of(problem, device, plan.split)
    alone = replace(problem, profiles={**problem.profiles, device: _ONE_WAY[way]})
    seconds = link_seconds(alone, device, codec, trains=any(plan.ranks.values()))
    assert seconds is not None, "both directions are given"
    return round(seconds)


def _waves(plan: Plan) -> float:
    """Return the micro-batches of a step."""
    return plan.batch_size / plan.micro_batch


def _factor_bytes(ranks: Mapping[str, int], targets: Mapping[str, Shape]) -> int:
    return _FACTOR_BYTES * sum(
        math.prod(factor) for name, rank in ranks.items() for factor in targets[name].factors(rank)
    )
