"""What given plans come to in a problem: wave time, utility, memory of the coordinator.

It knows no rule by which plans are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from coordinator.planning.costs import (
    Ranks,
    codec_of,
    device_seconds,
    server_base_bytes,
    server_rows_bytes,
    server_seconds,
)
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.ranks import worth
from coordinator.planning.splits import Server
from edge_sdk.model.precision import Base
from edge_sdk.protocol.plan import Plan

T = TypeVar("T")


def wave_seconds(
    problem: PlanningProblem, plans: Mapping[str, Plan], server_ranks: Ranks
) -> float | None:
    """Return the seconds of a wave on the slower side; None where a speed or link is unknown."""
    own = [device_seconds(problem, d, p.split, p.ranks) for d, p in plans.items()]
    depths = {device: plan.split for device, plan in plans.items()}
    server_s = server_wave_seconds(problem, depths, server_ranks)
    return slowest([*own, server_s])


def slowest(times: Sequence[float | None]) -> float | None:
    """Return the longest of *times*; None where one is unknown."""
    known = [seconds for seconds in times if seconds is not None]
    return max(known) if len(known) == len(times) else None


def server_wave_seconds(
    problem: PlanningProblem, splits: Mapping[str, int], ranks: Ranks
) -> float | None:
    """Return the coordinator's seconds of a wave at *splits*; None where its speed is unknown."""
    times = _by_rows(problem, splits, ranks, server_seconds)
    known = [seconds for seconds in times if seconds is not None]
    return _together(problem).seconds_of(known) if len(known) == len(times) else None


def server_bytes(problem: PlanningProblem, splits: Mapping[str, int], ranks: Ranks) -> float:
    """Return the coordinator's peak bytes with devices at *splits* and adapters at *ranks*."""
    first = min(splits.values(), default=problem.num_blocks)
    rows = _by_rows(problem, splits, ranks, server_rows_bytes)
    return server_base_bytes(problem, first, ranks) + _together(problem).bytes_of(rows)


def _together(problem: PlanningProblem) -> Server:
    """Return a coordinator that has as many devices at once as a round."""
    return Server(math.inf, (), problem.config.devices_per_round)


def _by_rows(
    problem: PlanningProblem,
    splits: Mapping[str, int],
    ranks: Ranks,
    cost: Callable[[PlanningProblem, str, int, Ranks], T],
) -> list[T]:
    """Return what the rows of each device cost; where they are alike, it is found once."""
    known: dict[tuple[int, int, str], T] = {}
    found = []
    for device, split in splits.items():
        key = problem.kind(device), split, codec_of(problem, device, split)
        if key not in known:
            known[key] = cost(problem, device, split, _above(problem, split, ranks))
        found.append(known[key])
    return found


def bytes_by_base(
    problem: PlanningProblem, splits: Mapping[str, int], ranks: Ranks
) -> dict[Base, float]:
    """Return what `server_bytes` does for each base that the coordinator could have.

    The largest weights come first. 16 bits need products in 16 bits.
    """
    bases: list[Base] = ["float32", "int8", "int4"]
    if problem.server.compute_bytes == 2:
        bases.insert(1, "bfloat16")
    own = problem.config.base
    if own not in bases:
        bases.insert(1, own)
    return {
        base: server_bytes(
            replace(problem, config=replace(problem.config, base=base)), splits, ranks
        )
        for base in bases
    }


def fitting_base(by_base: Mapping[Base, float], budget_bytes: float) -> tuple[Base, float] | None:
    """Return the base with the largest weights that fit, and its bytes; None where none fits."""
    fit = (found for found in by_base.items() if found[1] <= budget_bytes)
    return next(fit, None)


def _above(problem: PlanningProblem, split: int, ranks: Ranks) -> dict[str, int]:
    """Return the ranks of the weights that rows of a split pass through."""
    return {n: ranks.get(n, 0) for n in problem.weights(split, problem.num_blocks)}


def utility(problem: PlanningProblem, plans: Mapping[str, Plan], server_ranks: Ranks) -> float:
    """Return importance times the worth of the rank, over all weights, averaged over devices.

    A weight has the rank of whoever trains it for that device's samples: device or coordinator.
    """
    kind = problem.config.planning.utility
    values: dict[tuple[str, int], float] = {}

    def value(name: str, rank: int) -> float:
        found = values.get((name, rank))
        if found is None:
            found = values[name, rank] = problem.importance_of(name) * worth(kind, rank)
        return found

    totals = []
    for plan in plans.values():
        ranks = {**server_ranks, **plan.ranks}
        totals.append(math.fsum([value(n, ranks.get(n, 0)) for n in problem.facts.targets]))
    return math.fsum(totals) / max(1, len(totals))
