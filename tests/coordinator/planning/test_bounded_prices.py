"""What planning remembers of devices and prices goes with them, and changes no plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.rules import SERVER
from coordinator.planning import problem as problems
from coordinator.planning import ranks
from coordinator.planning.joint import Draft, plan_all
from coordinator.planning.plan_set import PlanSet
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.ranks import Knapsack
from coordinator.planning.run_planner import Planner
from edge_sdk.errors import RefusedError
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import SLOW, make_problem, model_of
from tests.coordinator.planning.test_shared_prices import by_itself

MODEL = model_of("llama")
ROUNDS, HERE = 12, 6
FEW = 100


def board(rng: np.random.Generator) -> DeviceProfile:
    """A board whose memory and speed nobody else has; it may be too small for any plan."""
    memory, speed = rng.uniform(1.7e7, 2.6e7), rng.uniform(1e7, 9e7)
    return replace(SLOW, memory_bytes=float(memory), flops_per_s=float(speed))


def join(planner: Planner, device: str, rng: np.random.Generator) -> bool:
    """Let a device join; return whether it may take part."""
    try:
        planner.profiled(device, board(rng))
        planner.plan(device)
    except RefusedError:
        planner.profiles.pop(device, None)
        return False
    return True


def end_round(planner: Planner, rng: np.random.Generator, present: list[str]) -> None:
    """End a round in which all weights became more or less important."""
    values = {name: float(rng.lognormal()) for name in MODEL[0].targets}
    reports = {name: Report(1, 8, {}, {}, values) for name in (SERVER, *planner.profiles)}
    planner.round_ended(1, reports, present)


def whole_without_memory(problem: PlanningProblem) -> PlanSet:
    """The plans for all, with each price found anew."""
    return plan_all(by_itself(problem))


@pytest.mark.parametrize("rule", ["rngwp", "uniform"])
def test_what_is_remembered_is_bounded_by_who_is_here(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds in which devices come, go and change leave no more behind than a few of them need."""
    monkeypatch.setattr(problems, "FEW_KNOWN", FEW)
    monkeypatch.setattr(problems, "MOST_GROWTH", 1)
    monkeypatch.setattr(ranks, "MOST_PATHS", 2)
    rng, problem = np.random.default_rng(0), make_problem(MODEL, planning={"ranks": rule})
    planner = Planner(problem.config, problem.facts, replace(problem, profiles={}))
    names, seen = iter(f"d{number}" for number in range(10_000)), []
    for device in ("first", "second"):
        planner.profiled(device, SLOW)
    planner.begin(["first", "second"])

    for _ in range(ROUNDS):
        while len(planner.profiles) < HERE:
            join(planner, next(names), rng)
        for device in list(planner.profiles)[:2]:
            join(planner, device, rng)  # it has another speed now
        end_round(planner, rng, sorted(planner.profiles)[-4:])
        now = planner._problem
        seen.append((len(now.known), len(now.tables), len(now._options)))
        shared = [found for found in now.tables.values() if isinstance(found, Knapsack)]
        assert all(len(found._known) <= 2 for found in shared)
        assert {device for device, _ in now._options} <= planner.profiles.keys()
        assert plan_all(now) == whole_without_memory(now)

    one_round = seen[0]
    assert all(
        own <= max(FEW, most) + most
        for row in seen
        for own, most in zip(row, one_round, strict=True)
    )
    assert any(after[0] < before[0] for before, after in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("aggregation", ["exact", "fedavg"])
def test_a_part_is_that_of_the_whole(aggregation: str) -> None:
    """What a device that joins is given alone is what the plan for all has for it."""
    rule: dict[str, Any] = {"ranks": "uniform" if aggregation == "fedavg" else "rngwp"}
    rng = np.random.default_rng(1)
    fleet = {f"d{number}": board(rng) for number in range(12)}
    config = {"aggregation": aggregation}
    problem = make_problem(MODEL, planning=rule, profiles=fleet, config=config)

    whole, draft = whole_without_memory(problem), Draft(problem)

    assert draft.refused == whole.refused
    assert whole.plans
    for device, plan in whole.plans.items():
        assert draft.part(device) == (plan, whole.explanation.devices[device])
    assert draft.ranks(SERVER) == whole.server_ranks
    assert set(draft.server_weights) == whole.server_ranks.keys()
    for device in whole.refused:
        with pytest.raises(RefusedError):
            draft.part(device)
