"""No plan of anybody gives a device fewer blocks than `planning.min_split`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.costs import device_bytes
from coordinator.planning.fixed import plan_device, plan_server
from coordinator.planning.joint import plan_all
from coordinator.planning.ladder import smaller
from coordinator.planning.problem import PlanningProblem, ServerProfile
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import FAST, SLOW, make_problem, model_of, with_memory

LEAST = 3
STRONG = ServerProfile(memory_bytes=1e9, flops_per_s=1e12)


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


def splits(problem: PlanningProblem) -> dict[str, int]:
    """What each device gets."""
    return {device: plan.split for device, plan in plan_all(problem).plans.items()}


def test_a_fast_coordinator_takes_no_block_below_it(llama: Any) -> None:
    """Water-filling would leave the slow device one block; with a least split it has more."""
    free = make_problem(llama, server=STRONG)
    least = make_problem(llama, server=STRONG, planning={"min_split": LEAST})

    assert splits(free)["a"] == 1
    assert splits(least)["a"] == LEAST
    assert splits(least)["b"] >= LEAST
    story = plan_all(least).explanation
    assert [option.split for option in story.devices["a"].options] == [3, 4, 5]
    assert f"planning.min_split {LEAST}: no device runs fewer blocks" in story.notes


@pytest.mark.parametrize("rule", ["armsc", "memory"])
def test_memory_for_fewer_blocks_alone_is_refused_by_name(llama: Any, rule: str) -> None:
    """A device that could hold one block is refused under a least split of three, and says why."""
    free = make_problem(llama, planning={"split": rule})
    one = 1.01 * device_bytes(free, "a", 1, {})
    least = make_problem(llama, planning={"split": rule, "min_split": LEAST})

    assert splits(with_memory(free, a=one))["a"] == 1
    found = plan_all(with_memory(least, a=one))

    assert "a" not in found.plans
    assert f"planning.min_split {LEAST} gives it no fewer blocks" in found.refused["a"]
    assert found.plans["b"].split >= LEAST


def test_a_device_that_cannot_train_runs_the_least_split_forward(llama: Any) -> None:
    """Frozen blocks leak what trained ones do: there are as many of them."""
    problem = make_problem(llama, planning={"min_split": LEAST, "deadline_s": 1e-9})
    one = replace(problem, profiles={"a": SLOW, "b": FAST})

    plans = plan_all(one).plans

    assert {plan.split for plan in plans.values()} == {LEAST}
    assert all(plan.is_forward_only for plan in plans.values())


def test_a_device_of_which_nothing_is_known(llama: Any) -> None:
    """Without a memory budget it runs what the config says, and no less than the least split."""
    profiles = {"a": DeviceProfile(), "b": FAST}
    problem = make_problem(llama, profiles=profiles, planning={"min_split": LEAST})
    deeper = {"default": DeviceSettings(split=4, batch_size=4, codec="bfloat16")}
    deep = make_problem(llama, profiles=profiles, planning={"min_split": LEAST}, config=deeper)

    assert splits(problem)["a"] == LEAST
    assert splits(deep)["a"] == 4


def test_the_ladder_ends_at_it(llama: Any) -> None:
    """However often a device runs out of memory, it keeps that many blocks."""
    facts, _ = llama
    config = ServeConfig(
        model="m",
        default=DeviceSettings(split=5 - 1, batch_size=4, codec="float32"),
        lora=LoraConfig(r=4),
        planning=PlanningConfig(min_split=LEAST),
    )
    plan, seen = plan_device(config, facts, "a"), set[int]()
    ranks = plan_server(config, facts, 1)

    while (next_ := smaller(config, facts, plan, ranks)) is not None:
        seen.add(next_.split)
        plan = next_

    assert seen == {4, LEAST}
    assert plan.is_forward_only
