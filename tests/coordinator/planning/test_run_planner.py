"""The planner of a run goes on whoever comes, leaves, fails or comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.planning.costs import device_bytes, device_flops
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.replan import replan
from coordinator.planning.run_planner import Planner
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from edge_sdk.model.kept.part_cache import PartCache
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import FAST, SLOW, make_problem, model_of
from tests.e2e.cluster import save_model


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


def planner_of(problem: PlanningProblem, *devices: str) -> Planner:
    """A planner whose first plans are for *devices*, all of them fast."""
    planner = Planner(problem.config, problem.facts, replace(problem, profiles={}))
    for device in devices:
        planner.profiled(device, FAST)
    planner.begin(devices)
    return planner


def memory_for(problem: PlanningProblem, rank: int) -> DeviceProfile:
    """A device that has just room for all blocks with *rank* everywhere."""
    names = problem.weights(0, problem.num_blocks)
    needed = device_bytes(problem, "a", problem.num_blocks, dict.fromkeys(names, rank))
    margin = problem.config.planning.memory_margin
    return replace(FAST, memory_bytes=1.0001 * needed / (1.0 - margin))


def test_who_came_after_the_checkpoint_still_has_a_plan_after_a_rewind(llama: Any) -> None:
    """Its profile is kept, and a plan is made for it anew."""
    planner = planner_of(make_problem(llama), "a", "b")
    checkpoint = planner.state()
    planner.profiled("late", SLOW)
    assert planner.plan("late") is not None

    planner.load_state(checkpoint)

    assert planner.is_known("late")
    assert planner.plan("late") is not None
    assert planner.first == min(p.split for p in planner.plans.plans.values())  # type: ignore[union-attr]


def test_who_left_and_was_saved_so_may_come_back(llama: Any) -> None:
    """A plan whose reasons were lost is measured again, by the numbers of today."""
    planner = planner_of(make_problem(llama), "a", "b", "c")
    planner.round_ended(1, {}, ["a", "b"])
    resumed = planner_of(make_problem(llama), "a")
    resumed.load_state(planner.state())

    resumed.profiled("c", FAST)

    assert resumed.plan("c") is not None


def test_an_unknown_device_that_runs_out_of_memory_harms_nobody(llama: Any) -> None:
    """It may fail before it has told what it offers."""
    planner = planner_of(make_problem(llama), "a", "b")
    planner.round_ended(1, {}, ["a"])

    planner.ran_out_of_memory("b")
    planner.ran_out_of_memory("never-seen")

    assert planner.plan("a") is not None


def test_memory_that_was_short_is_planned_with_nine_tenths_of_what_the_plan_took(
    llama: Any,
) -> None:
    """The budget, which leaves a margin alone, is 90 % of the plan's estimate."""
    problem = make_problem(llama, length=512)
    planner = planner_of(problem, "a", "b")
    plan = planner.plan("a")
    assert plan is not None
    full = replace(problem, profiles={"a": FAST, "b": FAST})
    took = device_bytes(full, "a", plan.split, plan.ranks)

    planner.ran_out_of_memory("a")

    capped = replace(problem, profiles=planner.profiles)
    assert capped.budget_bytes("a") == pytest.approx(0.9 * took)


def test_equal_ranks_stay_equal_when_a_weaker_device_comes(llama: Any) -> None:
    """Under fedavg everybody changes to the new rank, however little that gains."""
    model = llama
    config = {
        "aggregation": "fedavg",
        "default": DeviceSettings(split=5, batch_size=4, micro_batch=2, codec="bfloat16"),
    }
    planning = {"split": "fixed", "ranks": "uniform"}
    problem = make_problem(model, planning=planning, config=config)
    known = replace(problem, profiles={"a": FAST})
    planner = planner_of(problem, "a", "b")
    planner.profiled("weak", memory_for(known, 2))
    planner.plan("weak")

    decision = planner.round_ended(1, {}, ["a", "b", "weak"])

    assert decision is not None
    ranks = {rank for plan in decision.plans.plans.values() for rank in plan.ranks.values()}
    assert ranks == {2}


def test_given_ranks_do_not_count_for_the_equal_one(llama: Any) -> None:
    """A pattern keeps its rank; the others share that of the weakest device."""
    lora = LoraConfig(r=4, rank_pattern={"q_proj": 16})
    config = {
        "aggregation": "fedavg",
        "lora": lora,
        "default": DeviceSettings(split=5, batch_size=4, micro_batch=2, codec="bfloat16"),
    }
    planning = {"split": "fixed", "ranks": "uniform"}
    problem = make_problem(llama, planning=planning, config=config)
    known = replace(problem, profiles={"a": FAST})
    planner = Planner(problem.config, problem.facts, replace(problem, profiles={}))
    planner.profiled("a", FAST)
    planner.profiled("b", memory_for(known, 4))

    plans = planner.begin(["a", "b"]).plans

    for own in (plans["a"].ranks, plans["b"].ranks):
        given = {rank for name, rank in own.items() if name.endswith("q_proj")}
        others = {rank for name, rank in own.items() if not name.endswith("q_proj")}
        assert given == {16}
        assert others == {r for n, r in plans["b"].ranks.items() if not n.endswith("q_proj")}


def test_a_plan_that_cannot_be_made_leaves_the_old_one(llama: Any) -> None:
    """Where the coordinator could not hold what a new plan leaves to it, the run goes on."""
    evaluation = EvaluationConfig(data=DataConfig(path="dev.jsonl"))
    before = make_problem(llama, config={"evaluation": evaluation})
    current = plan_all(before)
    slower = {"a": replace(SLOW, flops_per_s=1e6), "b": FAST}
    now = replace(before, profiles=slower, server=replace(before.server, memory_bytes=1.0))

    decision = replan(current, before, now)

    assert (decision.is_new, decision.plans) == (False, current)
    assert decision.reasons[-1].startswith("kept: the coordinator needs")


def test_a_coordinator_too_small_to_evaluate_says_so(llama: Any) -> None:
    """Also where no device is left to blame."""
    evaluation = EvaluationConfig(data=DataConfig(path="dev.jsonl"))
    problem = make_problem(llama, config={"evaluation": evaluation})
    tiny = replace(problem.server, memory_bytes=1e6)
    planner = Planner(problem.config, problem.facts, replace(problem, server=tiny))

    with pytest.raises(ConfigError, match="to evaluate the whole model"):
        planner.profiled("a", replace(FAST, memory_bytes=1e6))


def test_bytes_that_hold_no_adapter_are_refused(llama: Any) -> None:
    """One line with the key, instead of a device that trains nothing."""
    problem = make_problem(llama, planning={"adapter_bytes": 1.0})

    with pytest.raises(ConfigError, match=r"planning.adapter_bytes: 1 bytes hold no adapter"):
        planner_of(problem, "a")


@pytest.mark.parametrize(
    ("planning", "is_known"),
    [
        ({"split": "armsc"}, True),
        ({"split": "armsc", "server_flops_per_s": 7e9}, True),
        ({"split": "memory"}, False),
    ],
)
def test_the_coordinator_measures_its_own_speed(
    tmp_path: Path, planning: dict[str, Any], is_known: bool
) -> None:
    """Where splits depend on it and nobody has said what it is."""
    model = save_model("llama", tmp_path / "model")
    config = ServeConfig(model=str(model), planning=PlanningConfig(**planning), device="cpu")

    found = ServerModel(config, PartCache(tmp_path / "parts")).planning_problem()

    assert found is not None
    assert (found.server_speed is not None) == is_known
    assert planning.get("server_flops_per_s") in (None, found.server_speed)


def test_a_round_shows_the_speed_that_a_device_could_not_measure(llama: Any) -> None:
    """Time that the estimate would take at the true speed gives that speed, and a new plan."""
    planner = planner_of(make_problem(llama), "a", "b")
    planner.profiled("a", replace(FAST, flops_per_s=None))
    planner.begin(["a", "b"])
    plan = planner.plan("a")
    assert plan is not None
    full = replace(make_problem(llama), profiles=planner.profiles)
    flops = device_flops(full, "a", plan.split, plan.ranks)
    true_speed = SLOW.flops_per_s
    assert true_speed is not None

    planner.stepped("a", 3 * full.tokens("a"), 300 * flops / true_speed)  # graphs are loaded
    for _ in range(2):
        planner.stepped("a", 3 * full.tokens("a"), 3 * flops / true_speed)
        planner.stepped("b", 3 * full.tokens("b"), 1000.0)
    decision = planner.round_ended(1, {}, ["a", "b"])

    assert planner.profiles["a"].flops_per_s == pytest.approx(true_speed)
    assert planner.profiles["b"] == FAST
    assert decision is not None
    assert any("a: flops_per_s changed from unknown" in reason for reason in decision.reasons)
    assert decision.plans.plans["a"].split < plan.split
    again = planner_of(make_problem(llama), "b")
    again.load_state(planner.state())
    again.profiled("a", replace(FAST, flops_per_s=None))
    assert again.profiles["a"].flops_per_s == pytest.approx(true_speed)


def test_a_speed_that_a_device_tells_is_believed_again(llama: Any) -> None:
    """What rounds have shown counts only as long as nobody has measured it."""
    planner = planner_of(make_problem(llama), "a", "b")
    planner.profiled("a", replace(FAST, flops_per_s=None))
    planner.stepped("a", 1000, 1.0)
    planner.round_ended(1, {}, ["a", "b"])
    checkpoint = planner.state()
    planner.profiled("a", SLOW)

    planner.load_state(checkpoint)
    planner.stepped("a", 1000, 1.0)
    planner.round_ended(2, {}, ["a", "b"])

    assert planner.profiles["a"] == SLOW


def test_nothing_is_planned_after_the_last_round(llama: Any) -> None:
    """Devices leave by then, which is no reason for another plan."""
    problem = make_problem(llama)
    planner = planner_of(problem, "a", "b")
    before = planner.plans

    assert planner.round_ended(problem.config.rounds, {}, ["a"]) is None
    assert planner.plans is before
