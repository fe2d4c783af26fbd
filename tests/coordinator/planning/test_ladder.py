"""A device that could not do its plan gets a smaller one, a little at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.aggregation.ledger import Report
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.costs import device_bytes
from coordinator.planning.fixed import check_config, plan_device, plan_server
from coordinator.planning.joint import plan_all
from coordinator.planning.ladder import difference, smaller, smaller_step
from coordinator.planning.problem import PlanningProblem, step_of
from coordinator.planning.replan import plan_less
from coordinator.planning.run_planner import Planner
from edge_sdk.errors import OutOfMemory
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from edge_sdk.protocol.plan import Plan
from profiler.estimate.sizes import ModelShape
from tests.coordinator.planning.problems import FAST, make_problem, model_of

DEFAULT = DeviceSettings(split=3, batch_size=12, in_flight=2, codec="float32")
REPORT = Report(split=1, num_samples=4, pairs={}, head={}, importance={})


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


def config_of(**settings: Any) -> ServeConfig:
    """A fixed config: three blocks, twelve sequences at once, rank 4."""
    settings = {"model": "m", "default": DEFAULT, "lora": LoraConfig(r=4), **settings}
    return ServeConfig(**settings)


def rungs(config: ServeConfig, facts: ModelFacts) -> list[Plan]:
    """Every plan from the config's to the smallest."""
    found, plan = list[Plan](), plan_device(config, facts, "a")
    ranks = plan_server(config, facts, 1)
    step: Plan | None = plan
    while step is not None:
        found.append(step)
        step = smaller(config, facts, step, ranks)
    return found


def steps_of(plans: list[Plan]) -> list[str]:
    """What each plan takes away from the one before."""
    return [difference(old, new) for old, new in zip(plans, plans[1:], strict=False)]


def test_micro_batches_fall_first_then_blocks_then_ranks_then_training(llama: Any) -> None:
    """The whole ladder of a fixed config, in words."""
    facts, _ = llama

    plans = rungs(config_of(), facts)

    assert steps_of(plans) == [
        "micro-batch 12 -> 6",
        "micro-batch 6 -> 3",
        "micro-batch 3 -> 1",
        "split 3 -> 2",
        "split 2 -> 1",
        "largest rank 4 -> 2",
        "largest rank 2 -> 1",
        "computes forward only",
    ]
    assert {plan.batch_size for plan in plans} == {12}
    assert {plan.in_flight for plan in plans} == {1}, "no more under way than before"
    for plan in plans:
        assert list(plan.ranks) == facts.weights(0, plan.split)
        assert plan.ranks.keys() == plan.alphas.keys()


def test_what_is_under_way_falls_when_the_micro_batch_cannot(llama: Any) -> None:
    """Two micro-batches of one sequence become one."""
    facts, _ = llama
    default = replace(DEFAULT, micro_batch=1)
    plan = plan_device(config_of(default=default), facts, "a")

    assert plan.in_flight == 2
    assert smaller_step(plan) == replace(plan, in_flight=1)
    assert smaller_step(replace(plan, in_flight=1)) is None


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"aggregation": "fedavg"}, "split 2 -> 1"),
        ({"aggregation": "fedavg", "server_rank": 4}, "split 2 -> 1"),
        ({"default": replace(DEFAULT, split="all")}, "largest rank 2 -> 1"),
        ({"default": replace(DEFAULT, split="all", r=1)}, "micro-batch 3 -> 1"),
        ({"lora": LoraConfig(r=4, rank_pattern={"q_proj": 2})}, "largest rank 4 -> 2"),
    ],
)
def test_what_the_config_does_not_leave_open_stays(
    llama: Any, settings: dict[str, Any], last: str
) -> None:
    """Equal ranks, all blocks on the device, ranks given by name: the ladder ends above them."""
    facts, _ = llama
    config = config_of(**settings)
    check_config(config, facts)

    plans = rungs(config, facts)

    steps = steps_of(plans)
    assert last in steps
    assert "computes forward only" not in steps
    whole = config.default.split == "all"
    assert {p.split for p in plans} == ({5} if whole else {3, 2, 1})
    given = {p.ranks[n] for p in plans for n in p.ranks if config.lora.rank_of(n, -1) >= 0}
    assert given <= {2}
    if config.aggregation == "fedavg":
        assert {rank for p in plans for rank in p.ranks.values()} == {4}


def test_a_run_that_leaves_nothing_to_plan_has_a_ladder_too(llama: Any) -> None:
    """Each time it gets the next plan, and is told so; at the end it is told that there is none."""
    facts, _ = llama
    config = config_of()
    planner = Planner(config, facts, None)
    plans = rungs(config, facts)
    told = []

    assert (planner.plan("a"), planner.first) == (plans[0], None)
    for plan in plans[1:]:
        planner.ran_out_of_memory("a")
        told.append(planner.take_shrunk()["a"])
        assert planner.plan("a") == plan

    assert told == [f"ran out of memory: {step}" for step in steps_of(plans)]
    assert planner.first == 1
    assert planner.server_ranks == plan_server(config, facts, 1)
    with pytest.raises(OutOfMemory, match="under the smallest plan that this run has for it"):
        planner.ran_out_of_memory("a")
    assert planner.plan("a") == plans[-1]
    assert planner.plan("b") == plans[0], "nobody else pays for it"


def test_a_smaller_plan_outlives_rewinds_and_restarts(llama: Any) -> None:
    """Going back to an older checkpoint brings no plan back that was too much."""
    facts, _ = llama
    planner = Planner(config_of(), facts, None)
    before = planner.state()
    planner.ran_out_of_memory("a")
    small = planner.plan("a")

    planner.load_state(before)
    resumed = Planner(config_of(), facts, None)
    resumed.load_state(planner.state())

    assert planner.plan("a") == resumed.plan("a") == small


def planned(problem: PlanningProblem, **profiles: Any) -> Planner:
    """A planner of a run in which everything is planned."""
    planner = Planner(problem.config, problem.facts, replace(problem, profiles={}))
    for device, profile in profiles.items():
        planner.profiled(device, profile)
    planner.begin(profiles)
    return planner


def has_less(planner: Planner, device: str) -> bool:
    """Let a device run out of memory; return whether there is less for it."""
    try:
        planner.ran_out_of_memory(device)
    except OutOfMemory:
        return False
    return True


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_every_plan_after_lack_of_memory_takes_less(llama: Any, micro_batch: int) -> None:
    """From the largest plan to the smallest, which computes forward only; then nothing is left."""
    default = DeviceSettings(split=1, batch_size=4, micro_batch=micro_batch, codec="float32")
    planning = {"split": "memory", "rank_set": (2, 8)}
    problem = make_problem(llama, planning=planning, config={"default": default}, length=64)
    planner = planned(problem, a=FAST, b=FAST)
    first = planner.plan("a")
    assert first is not None
    seen = [first]
    while has_less(planner, "a") and len(seen) < 40:
        planner.profiled("a", FAST)  # it comes back, and offers what it always did
        plan = planner.plan("a")
        assert plan is not None
        seen.append(plan)

    took = []
    for plan in seen:
        full = replace(problem, profiles={"a": FAST, "b": FAST}, steps={"a": step_of(plan)})
        took.append(device_bytes(full, "a", plan.split, plan.ranks))
    assert took == sorted(took, reverse=True)
    assert len(set(took)) == len(took)
    assert (seen[-1].split, seen[-1].micro_batch, seen[-1].is_forward_only) == (1, 1, True)
    assert [p.is_forward_only for p in seen].count(True) == 1


def test_smaller_micro_batches_are_enough_where_they_save_enough(llama: Any) -> None:
    """Blocks and ranks stay, and with them the result of every step."""
    default = DeviceSettings(split=1, batch_size=8, codec="float32")
    problem = make_problem(
        llama, planning={"split": "memory"}, config={"default": default}, length=512
    )
    old = plan_all(problem).plans["a"]

    found = plan_less(problem, "a", old, {})

    assert found is not None
    assert found.plan == replace(old, micro_batch=4)


def test_a_plan_is_not_refused_because_it_saves_less_than_a_tenth(llama: Any) -> None:
    """Where embeddings are most of a device's memory, a block less is still a block less."""
    default = DeviceSettings(split=1, batch_size=1, codec="float32")
    problem = make_problem(llama, config={"default": default})
    planner = planned(problem, a=FAST, b=FAST)
    old = planner.plan("a")
    assert old is not None
    assert old.split == 2

    planner.ran_out_of_memory("a")
    planner.profiled("a", FAST)

    assert planner.take_shrunk() == {"a": "ran out of memory: split 2 -> 1"}
    assert planner.plan("a") == smaller(problem.config, problem.facts, old, {})
    assert planner.server_ranks is not None
    assert set(planner.server_ranks) >= set(problem.weights(1, 5))


def test_who_was_killed_and_missed_the_end_of_the_round_gets_less_too(llama: Any) -> None:
    """What it ran is remembered until it is back and can say what ended it."""
    default = DeviceSettings(split=1, batch_size=4, codec="float32")
    problem = make_problem(llama, config={"default": default}, length=256)
    planner = planned(problem, a=FAST, b=FAST)
    old = planner.plan("a")
    assert old is not None
    planner.round_ended(1, {}, ["b"])
    assert planner.plan("a") is None

    planner.ran_out_of_memory("a")
    planner.profiled("a", FAST)

    assert planner.take_shrunk() == {"a": "ran out of memory: micro-batch 4 -> 2"}
    assert planner.plan("a") == replace(old, micro_batch=2)


# ---- missed rounds ----


def test_who_missed_two_of_three_rounds_gets_the_next_smaller_plan(llama: Any) -> None:
    """One miss is an accident; the count begins anew with each plan."""
    facts, _ = llama
    planner = Planner(config_of(), facts, None)
    plans = rungs(config_of(), facts)

    planner.missed("a")
    assert planner.take_shrunk() == {}
    planner.round_ended(1, {}, ["a"])
    planner.missed("a")
    assert planner.take_shrunk() == {"a": "missed 2 of the last 2 rounds: micro-batch 12 -> 6"}
    planner.round_ended(2, {}, ["a"])
    planner.missed("a")

    assert planner.plan("a") == plans[1]
    assert planner.take_shrunk() == {}


def test_who_missed_one_round_in_three_keeps_its_plan(llama: Any) -> None:
    """Rounds that it took part in count for it."""
    facts, _ = llama
    planner = Planner(config_of(), facts, None)
    before = planner.plan("a")
    for _ in range(4):
        planner.missed("a")
        planner.round_ended(1, {}, ["a"])
        for _ in range(2):
            planner.round_ended(1, {"a": REPORT}, ["a"])

    assert planner.plan("a") == before


def test_a_planned_device_that_misses_gets_its_plan_back_only_with_new_plans(llama: Any) -> None:
    """Its share is smaller at once; whoever plans again for a reason may give it more."""
    problem = make_problem(llama)
    planner = planned(problem, a=FAST, b=FAST)
    old = planner.plan("a")
    assert old is not None
    checkpoint = planner.state()

    planner.missed("a")
    planner.missed("a")

    new = planner.plan("a")
    assert new == smaller_step(old)
    planner.load_state(checkpoint)
    assert planner.plan("a") == new, "a rewind is no reason"
    planner.round_ended(1, {}, ["a", "b"])
    assert planner.plan("a") == new, "nothing has changed"
    planner.profiled("a", replace(FAST, flops_per_s=FAST.flops_per_s / 8))  # type: ignore[operator]
    planner.round_ended(2, {}, ["a", "b"])
    assert planner.plan("a") != new
