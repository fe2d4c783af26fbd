"""Decide between rounds whether the plans still fit, and whether new ones are worth the change.

Pure. Every decision comes with its reasons in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from coordinator.aggregation.rules import RULES
from coordinator.planning.costs import device_bytes
from coordinator.planning.joint import Draft, plan_all
from coordinator.planning.ladder import smaller, smaller_steps
from coordinator.planning.objective import utility, wave_seconds
from coordinator.planning.plan_set import Decision, PlanSet
from coordinator.planning.problem import PlanningProblem, step_of
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile

# A device that ran out of memory under a plan gets at most this part of what the plan took.
AFTER_OUT_OF_MEMORY = 0.9
_ROUNDED_UP = 1.0 + 1e-9
_SPEEDS = ("flops_per_s", "up_bytes_per_s", "down_bytes_per_s")


def drift(old: Mapping[str, float], new: Mapping[str, float]) -> float:
    """Return the relative change of a weight's share in all importance, averaged over weights.

    Shares count: plans do not depend on the scale of importance, which falls with the loss. A
    weight that had none and has some now counts as a change of 1.
    """
    names = old.keys() & new.keys()
    total_old, total_new = (math.fsum(v[n] for n in names) for v in (old, new))
    if not names or total_old <= 0.0 or total_new <= 0.0:
        return float(bool(names) and (total_old > 0.0) != (total_new > 0.0))
    changes = []
    for name in names:
        before, after = old[name] / total_old, new[name] / total_new
        changes.append(abs(after - before) / before if before > 0.0 else float(after > 0.0))
    return math.fsum(changes) / len(changes)


def after_out_of_memory(
    profile: DeviceProfile, peak_bytes: float, margin: float = 0.0
) -> DeviceProfile:
    """Return the profile to plan with after a plan of *peak_bytes* did not fit its device.

    Its budget, which leaves *margin* of the memory alone, is then part of what the plan took.
    """
    most = AFTER_OUT_OF_MEMORY * peak_bytes / (1.0 - margin)
    known = profile.memory_bytes
    return replace(profile, memory_bytes=most if known is None else min(most, known))


class Reduced(NamedTuple):
    """What a device gets that could not hold its plan."""

    plan: Plan
    memory_bytes: float
    """What it is planned with from now on, in bytes."""
    draft: Draft | None
    """The plans of which it is a part; None where nothing but blocks, ranks or micro-batches of
    this device was made less."""


def plan_less(
    problem: PlanningProblem, device: str, old: Plan, server_ranks: Mapping[str, int]
) -> Reduced | None:
    """Return what a device gets that ran out of memory under *old*; None where nothing is less.

    It is given part of the bytes that *old* took: by smaller micro-batches alone where these are
    enough, else by other blocks and ranks. Where nothing fits that trains, it gets the next smaller
    plan, whatever that takes: what was too much is known, what is enough is not.

    Args:
        problem: The situation.
        device: The device.
        old: Its plan so far.
        server_ranks: Ranks that the coordinator would train weights with.
    """
    now = _with_step(problem, device, old)
    margin = problem.config.planning.memory_margin
    took = device_bytes(now, device, old.split, old.ranks)
    capped = after_out_of_memory(problem.profiles[device], took, margin)
    assert capped.memory_bytes is not None
    small = replace(now, profiles={**problem.profiles, device: capped})
    for plan in smaller_steps(old):
        bytes_ = device_bytes(_with_step(small, device, plan), device, plan.split, plan.ranks)
        if bytes_ <= small.budget_bytes(device):
            return Reduced(plan, capped.memory_bytes, None)
    frozen = None
    for step in (old, *smaller_steps(old)):
        try:
            draft = Draft(_with_step(small, device, step))
            reduced = Reduced(draft.part(device).plan, capped.memory_bytes, draft)
        except (ConfigError, RefusedError):  # one of both cannot hold its share
            continue
        if old.is_forward_only or not reduced.plan.is_forward_only:
            return reduced
        frozen = frozen or reduced
    next_ = smaller(problem.config, problem.facts, old, server_ranks)
    if next_ is None or (frozen is not None and next_.is_forward_only):
        return frozen
    bytes_ = device_bytes(_with_step(now, device, next_), device, next_.split, next_.ranks)
    return Reduced(next_, _ROUNDED_UP * bytes_ / (1.0 - margin), None)


def _with_step(problem: PlanningProblem, device: str, plan: Plan) -> PlanningProblem:
    """Return the problem with a device that has as much of a step under way as *plan*."""
    return replace(problem, steps={**problem.steps, device: step_of(plan)})


def reasons_to_replan(current: PlanSet, before: PlanningProblem, now: PlanningProblem) -> list[str]:
    """Say why a new plan is due; empty where none is.

    Args:
        current: The plans in force, made for the problem *before*.
        before: That problem.
        now: The problem now.
    """
    planning = now.config.planning
    if now.is_fixed or not planning.replan:
        return []
    found = _newcomers(before, now)
    for device in sorted(now.profiles.keys() & before.profiles.keys()):
        found += _changes(current, before, now, device)
    if planning.measures_importance and now.importance is not None:
        if before.importance is None:
            found.append("importance was measured for the first time")
        elif (moved := drift(before.importance, now.importance)) > planning.drift:
            found.append(f"importance moved by {moved:.0%}, more than {planning.drift:.0%}")
    return found


def _newcomers(before: PlanningProblem, now: PlanningProblem) -> list[str]:
    came = [f"{d} joined" for d in sorted(now.profiles.keys() - before.profiles.keys())]
    return came + [f"{d} left" for d in sorted(before.profiles.keys() - now.profiles.keys())]


def _changes(
    current: PlanSet, before: PlanningProblem, now: PlanningProblem, device: str
) -> list[str]:
    """Say what changed about one device."""
    planning, found = now.config.planning, []
    plan = current.plans.get(device)
    old, new = before.profiles[device], now.profiles[device]
    budget = now.budget_bytes(device)
    if plan is None:
        return [] if old == new else [f"{device}: refused until now, its profile changed"]
    planned_bytes = device_bytes(now, device, plan.split, plan.ranks)
    if planned_bytes > budget:
        found.append(
            f"{device}: its plan takes {planned_bytes / 2**20:,.1f} MiB, "
            f"{budget / 2**20:,.1f} MiB are left to it"
        )
    is_timed = now.split_rule.weighs_time or planning.deadline_s is not None
    for name in _SPEEDS if is_timed else ():
        was, now_is = getattr(old, name), getattr(new, name)
        if was is None or now_is is None:
            changed = was is not now_is
        else:
            changed = abs(now_is - was) > planning.drift * was
        if changed:
            found.append(f"{device}: {name} changed from {_number(was)} to {_number(now_is)}")
    return found


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def worth_changing(current: PlanSet, new: PlanSet, now: PlanningProblem) -> tuple[bool, str]:
    """Return whether *new* is better than *current* by enough, both judged by *now*."""
    if missing := sorted(new.plans.keys() - current.plans.keys()):
        return True, f"{', '.join(missing)}: no plan until now"
    if lost := sorted(current.plans.keys() & new.refused.keys()):
        return True, f"{lost[0]}: {new.refused[lost[0]]}"
    plans = {d: p for d, p in current.plans.items() if d in new.plans}
    for device, plan in plans.items():
        if device_bytes(now, device, plan.split, plan.ranks) > now.budget_bytes(device):
            return True, f"{device}: its plan no longer fits its memory"
    if why := _other_part(plans, new):
        return True, why
    if RULES[now.config.aggregation].needs_equal_ranks and _is_unequal(current, plans):
        return True, f"aggregation {now.config.aggregation!r} needs equal ranks"
    gain = now.config.planning.min_gain
    gains = {
        "wave time": _fall(wave_seconds(now, plans, current.server_ranks), new.wave_s),
        "utility": -_fall(utility(now, plans, current.server_ranks), new.utility),
    }
    text = ", ".join(f"{what} {g + 0.0:+.1%}" for what, g in gains.items())
    if max(gains.values()) >= gain and max(gains.values()) > 0:
        return True, f"gains: {text}"
    return False, f"kept, gains below {gain:.0%}: {text}"


def _other_part(plans: Mapping[str, Plan], new: PlanSet) -> str:
    """Say who computes forward only from now on, or trains again; empty if nobody does."""
    for device, plan in plans.items():
        is_frozen = new.plans[device].is_forward_only
        if is_frozen and not plan.is_forward_only:
            return f"{device}: {', '.join(new.explanation.devices[device].notes)}"
        if plan.is_forward_only and not is_frozen:
            return f"{device}: it can train now"
    return ""


def _is_unequal(current: PlanSet, plans: Mapping[str, Plan]) -> bool:
    """Return whether a weight has different ranks in different places."""
    found: dict[str, int] = dict(current.server_ranks)
    return any(
        found.setdefault(name, rank) != rank
        for plan in plans.values()
        for name, rank in plan.ranks.items()
    )


def _fall(old: float | None, new: float | None) -> float:
    """Return by what part of itself a number has fallen; 0 where it is unknown."""
    if not old or new is None or not math.isfinite(old) or not math.isfinite(new):
        return 0.0
    return (old - new) / old


def replan(current: PlanSet, before: PlanningProblem, now: PlanningProblem) -> Decision:
    """Return the plans for the next round; those in force where no other can be made."""
    reasons = reasons_to_replan(current, before, now)
    if not reasons:
        return Decision(plans=current, is_new=False, reasons=())
    try:
        new = plan_all(now)
    except ConfigError as error:  # what runs goes on; whoever cannot is told when it joins
        return Decision(plans=current, is_new=False, reasons=(*reasons, f"kept: {error}"))
    is_better, why = worth_changing(current, new, now)
    plans = new if is_better else current
    return Decision(plans=plans, is_new=is_better, reasons=(*reasons, why))
