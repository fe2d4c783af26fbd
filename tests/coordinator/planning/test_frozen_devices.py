"""Devices that cannot train compute forward only; nobody else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.config.run import DeviceSettings
from coordinator.planning.costs import device_bytes, device_seconds, options
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem, ServerProfile
from coordinator.planning.replan import replan
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from profiler.estimate.sizes import ModelShape
from tests.coordinator.planning.problems import FAST, SLOW, make_problem, model_of, with_memory


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


def between(problem: PlanningProblem) -> float:
    """Memory in which device `a` can compute one block forward, but not train it."""
    frozen = device_bytes(problem, "a", 1, {})
    trained = min(option.device_bytes for option in options(problem, "a"))
    assert frozen < trained
    return (frozen + trained) / 2


def test_memory_without_room_for_a_backward_pass(llama: tuple[ModelFacts, ModelShape]) -> None:
    """Such a device holds one frozen block, the explanation says why, and the others train."""
    problem = make_problem(llama)
    small = with_memory(problem, a=between(problem))

    found = plan_all(small)

    assert found.plans["a"].is_forward_only
    assert found.plans["a"].split == 1
    assert found.explanation.devices["a"].notes == (
        "computes forward only: its memory cannot hold a backward pass",
    )
    assert found.explanation.devices["a"].planned_bytes <= small.budget_bytes("a")
    assert not found.plans["b"].is_forward_only
    assert any(found.server_ranks.values())


def test_memory_without_room_for_a_block(llama: tuple[ModelFacts, ModelShape]) -> None:
    """A device that cannot even compute forward is refused."""
    problem = make_problem(llama)
    least = device_bytes(problem, "a", 1, {})

    assert "needs" in plan_all(with_memory(problem, a=0.99 * least)).refused["a"]


def test_a_deadline_that_one_device_misses(llama: tuple[ModelFacts, ModelShape]) -> None:
    """It is the only one that computes forward only, and the wave is shorter for it."""
    free = make_problem(llama)
    fastest = {d: min(o.device_s or 0.0 for o in options(free, d)) for d in ("a", "b")}
    assert fastest["b"] < fastest["a"]
    deadline = (fastest["a"] + fastest["b"]) / 2

    problem = make_problem(llama, planning={"deadline_s": deadline})
    found = plan_all(problem)

    assert found.plans["a"].is_forward_only
    assert not found.plans["b"].is_forward_only
    (note,) = found.explanation.devices["a"].notes
    assert f"planning.deadline_s is {deadline:g}" in note
    alone = device_seconds(problem, "a", 1, {})
    assert alone is not None
    assert alone < fastest["a"]
    assert (found.wave_s or 0.0) < (plan_all(free).wave_s or 0.0)


def test_no_split_misses_the_deadline(llama: tuple[ModelFacts, ModelShape]) -> None:
    """However slow the coordinator is: nobody takes blocks for longer than that."""
    slow = ServerProfile(memory_bytes=1e9, flops_per_s=1e4)
    free = make_problem(llama, server=slow)
    table = [option.device_s or 0.0 for option in options(free, "b")]
    deadline = sorted(table)[1]
    deepest = plan_all(free).plans["b"].split
    assert table[deepest - 1] > deadline

    problem = make_problem(llama, server=slow, planning={"deadline_s": deadline})
    plan = plan_all(problem).plans["b"]

    assert not plan.is_forward_only
    assert table[plan.split - 1] <= deadline


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"devices": {"a": DeviceSettings(r=4)}}},
        {"config": {"lora": LoraConfig(rank_pattern={"q_proj": 2})}},
        {"config": {"aggregation": "fedavg"}, "planning": {"ranks": "uniform"}},
        {"config": {"devices": {"a": DeviceSettings(split="all")}}},
        {"profiles": {"a": replace(SLOW, memory_bytes=None), "b": FAST}},
    ],
    ids=["its rank", "a weight's rank", "equal ranks", "all blocks", "memory unknown"],
)
def test_what_the_config_gives_is_kept(
    llama: tuple[ModelFacts, ModelShape], changes: dict[str, Any]
) -> None:
    """A deadline changes no plan that is not the planner's to choose."""
    planning = {**changes.pop("planning", {}), "deadline_s": 1e-9}
    config = {"devices": {"b": DeviceSettings(r=4)}, **changes.pop("config", {})}
    problem = make_problem(llama, planning=planning, config=config, **changes)

    plan = plan_all(problem).plans["a"]

    assert not plan.is_forward_only


@pytest.mark.parametrize("server_speed", [1e8, 1e4])
def test_a_device_that_throttles_stops_training_and_begins_again(
    llama: tuple[ModelFacts, ModelShape], server_speed: float
) -> None:
    """A profile that misses the deadline makes it forward-only, one that keeps it trains again.

    Also where the coordinator is so slow that nobody gains a second.
    """
    server = ServerProfile(memory_bytes=1e9, flops_per_s=server_speed)
    profiles = {"a": FAST, "b": FAST}
    fast = make_problem(llama, profiles=profiles, server=server)
    deadline = 2 * min(option.device_s or 0.0 for option in options(fast, "a"))
    planning = {"deadline_s": deadline}
    fast = make_problem(llama, profiles=profiles, server=server, planning=planning)
    slow = replace(fast, profiles={"a": replace(FAST, flops_per_s=1e6), "b": FAST})
    first = plan_all(fast)
    assert not first.plans["a"].is_forward_only

    throttled = replan(first, fast, slow)
    back = replan(throttled.plans, slow, fast)

    assert throttled.is_new
    assert throttled.plans.plans["a"].is_forward_only
    assert not replan(throttled.plans, slow, slow).reasons
    assert back.is_new
    assert not back.plans.plans["a"].is_forward_only
