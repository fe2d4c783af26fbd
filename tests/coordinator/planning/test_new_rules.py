"""A rule for split points and one for ranks, each added by one line to its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.planning.joint import RANK_RULES, plan_all
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.splits import SPLIT_RULES, SplitRule, deepest_splits
from tests.coordinator.planning.problems import make_problem, model_of


def shallowest(options: Any, budgets: Any, server: Any, pins: Any) -> Any:
    """Leave all that can be left to the coordinator."""
    first = {device: own[:1] for device, own in options.items()}
    return deepest_splits(first, budgets, server, pins)


def by_depth(problem: PlanningProblem, device: str, loads: Mapping[str, Any], _: float) -> Any:
    """Give the largest rank to the last block, the smallest to the others."""
    last = problem.num_blocks - 1
    return {n: problem.ranks(device, n)[-1 if problem.place(n)[0] == last else 1] for n in loads}


def test_a_new_rule_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans follow rules that nobody knew before, and cost what those chose."""
    monkeypatch.setitem(SPLIT_RULES, "shallowest", SplitRule(shallowest))
    monkeypatch.setitem(RANK_RULES, "by-depth", by_depth)
    problem = make_problem(model_of("llama"))
    planning = replace(problem.config.planning, split="shallowest", ranks="by-depth")  # type: ignore[arg-type]

    found = plan_all(replace(problem, config=replace(problem.config, planning=planning)))

    assert {plan.split for plan in found.plans.values()} == {1}
    ranks = {problem.place(name)[0]: rank for name, rank in found.server_ranks.items()}
    assert ranks == {1: 1, 2: 1, 3: 1, 4: 8}
    assert all(plan.ranks.values() for plan in found.plans.values())


def test_the_config_s_choices_are_the_rules() -> None:
    """Every word that the config takes has a rule, and every rule a word."""
    hints = get_type_hints(PlanningConfig)

    assert set(get_args(hints["split"])) == SPLIT_RULES.keys()
    assert set(get_args(hints["ranks"])) == RANK_RULES.keys()
