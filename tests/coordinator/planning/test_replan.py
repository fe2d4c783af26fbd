"""Plans change for a reason, and only if that gains something."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings
from coordinator.planning.costs import (
    device_base_bytes,
    options,
)
from coordinator.planning.joint import plan_all
from coordinator.planning.objective import utility, wave_seconds
from coordinator.planning.replan import (
    after_out_of_memory,
    drift,
    reasons_to_replan,
    replan,
    worth_changing,
)
from edge_sdk.lora.targets import ModelFacts
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import (
    FAST,
    SLOW,
    make_problem,
    model_of,
    priced,
    with_memory,
)


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


def test_drift_is_a_mean_change_of_shares() -> None:
    """Nothing changed is 0, whatever the scale; a weight from nowhere is a whole change."""
    old = {"q": 1.0, "k": 1.0, "v": 2.0}

    assert drift(old, {n: 7.0 * value for n, value in old.items()}) == 0.0
    # shares 1/4 1/4 1/2 -> 1/2 1/4 1/4: changes of 1, 0 and 1/2
    assert drift(old, {"q": 2.0, "k": 1.0, "v": 1.0}) == pytest.approx(0.5)
    assert drift({"q": 1.0, "k": 0.0}, {"q": 1.0, "k": 1.0}) == pytest.approx((0.5 + 1.0) / 2)
    assert drift({}, old) == drift(old, {}) == 0.0
    assert drift({"q": 0.0}, {"q": 1.0}) == 1.0


def test_an_unchanged_situation_keeps_its_plans(llama: tuple[ModelFacts, ModelShape]) -> None:
    """No reasons, and the very same plans; small changes are no reason either."""
    before = make_problem(llama, importance=dict.fromkeys(llama[0].targets, 1.0))
    current = plan_all(before)
    nudged = replace(
        before,
        profiles={n: replace(p, flops_per_s=1.1e7) for n, p in {"a": SLOW}.items()} | {"b": FAST},
    )

    for now in (before, nudged):
        decision = replan(current, before, now)
        assert decision.plans is current
        assert (decision.is_new, decision.reasons) == (False, ())


def test_a_slower_device_hands_blocks_back(llama: tuple[ModelFacts, ModelShape]) -> None:
    """The reason is named, the new wave is shorter than the old plan's would now be."""
    before = make_problem(llama)
    current = plan_all(before)
    throttled = replace(FAST, flops_per_s=FAST.flops_per_s / 8)  # type: ignore[operator]
    now = replace(before, profiles={"a": SLOW, "b": throttled})

    decision = replan(current, before, now)

    assert decision.is_new
    assert "b: flops_per_s changed from 4e+07 to 5e+06" in decision.reasons
    assert decision.plans.plans["b"].split < current.plans["b"].split
    stayed = wave_seconds(now, current.plans, current.server_ranks)
    assert decision.plans.wave_s is not None
    assert stayed is not None
    assert decision.plans.wave_s < stayed


def test_a_small_gain_is_not_worth_a_change(llama: tuple[ModelFacts, ModelShape]) -> None:
    """The reason to plan again is there, and so is the reason to stay."""
    before = make_problem(llama, planning={"split": "memory", "ranks": "uniform"})
    current = plan_all(before)

    kept = worth_changing(current, plan_all(before), before)

    assert kept == (False, "kept, gains below 5%: wave time +0.0%, utility +0.0%")


def test_importance_that_moved_asks_for_new_ranks(llama: tuple[ModelFacts, ModelShape]) -> None:
    """Past the threshold the knapsack is filled again; a plan of more utility is taken."""
    problem = make_problem(llama, config={"devices": {"a": DeviceSettings(split=2)}})
    names = list(llama[0].targets)
    full = dict.fromkeys(problem.weights(0, 2), 2)
    room = device_base_bytes(problem, "a", 2) + priced(problem, full)
    problem = replace(
        with_memory(problem, a=room), profiles={"a": with_memory(problem, a=room).profiles["a"]}
    )
    before = replace(problem, importance={n: 20.0 if "q_proj" in n else 0.1 for n in names})
    now = replace(problem, importance={n: 20.0 if "down_proj" in n else 0.1 for n in names})
    current = plan_all(before)

    decision = replan(current, before, now)

    assert decision.is_new
    assert decision.reasons[0].startswith("importance moved by")
    old = utility(now, current.plans, current.server_ranks)
    assert decision.plans.utility >= 1.05 * old


def test_out_of_memory_shrinks_the_plan() -> None:
    """The budget falls below what the plan took, and the next plan keeps it."""
    large = model_of("llama", hidden_size=256, intermediate_size=512)
    before = make_problem(large, planning={"split": "memory"})
    before = with_memory(before, a=options(before, "a")[3].device_bytes)
    current = plan_all(before)
    peak = current.explanation.devices["a"].planned_bytes
    lowered = after_out_of_memory(before.profiles["a"], peak)
    now = replace(before, profiles={**before.profiles, "a": lowered})

    decision = replan(current, before, now)

    assert decision.is_new
    assert decision.reasons[0].startswith("a: its plan takes")
    assert decision.plans.explanation.devices["a"].planned_bytes < 0.9 * peak
    assert after_out_of_memory(DeviceProfile(), 100.0).memory_bytes == 90.0
    assert after_out_of_memory(DeviceProfile(memory_bytes=50.0), 100.0).memory_bytes == 50.0


def test_who_joins_gets_a_plan(llama: tuple[ModelFacts, ModelShape]) -> None:
    """A newcomer is a reason, and so is one who has left; a run that may not re-plan has none."""
    alone = make_problem(llama, profiles={"a": SLOW})
    both = make_problem(llama)
    current = plan_all(alone)

    decision = replan(current, alone, both)

    assert sorted(decision.plans.plans) == ["a", "b"]
    assert decision.reasons == ("b joined", "b: no plan until now")
    assert reasons_to_replan(decision.plans, both, alone) == ["b left"]
    frozen = replace(both, config=replace(both.config, planning=PlanningConfig(replan=False)))
    assert reasons_to_replan(current, alone, frozen) == []


def test_a_device_that_no_longer_fits_goes(llama: tuple[ModelFacts, ModelShape]) -> None:
    """The new plan without it is taken whatever it gains."""
    before = make_problem(llama)
    current = plan_all(before)
    now = with_memory(before, a=1000.0)

    decision = replan(current, before, now)

    assert decision.is_new
    assert sorted(decision.plans.plans) == ["b"]
    assert "a" in decision.plans.refused
