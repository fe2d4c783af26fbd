"""Where blocks share what they keep, no plan cuts between them, whoever makes it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.costs import options, server_base_bytes
from coordinator.planning.fixed import check_config
from coordinator.planning.joint import plan_all
from coordinator.planning.ladder import smaller
from coordinator.planning.run_planner import Planner
from edge_sdk.errors import ConfigError, EdgeError, ModelError
from edge_sdk.lora.targets import ModelFacts
from profiler.estimate.sizes import ModelShape
from tests.coordinator.planning.problems import FAST, make_problem, model_of, with_memory
from tests.tiny import BLOCKS

# Of five blocks the last two read what the second has kept.
SHARED = ((1, 3), (1, 4))
CUTS = (1, BLOCKS)


@pytest.fixture(scope="module")
def sharing() -> tuple[ModelFacts, ModelShape]:
    """A tiny model some of whose blocks share."""
    facts, shape = model_of("llama")
    return replace(facts, layout=replace(facts.layout, shared=SHARED)), shape


def test_every_rule_offers_legal_cuts_only(sharing: Any) -> None:
    """Whatever a device has of memory and speed, it gets one of the cuts that the model allows."""
    facts, _ = sharing
    assert facts.layout.cuts == CUTS
    found = set()
    rules = itertools.product(("memory", "armsc"), ("uniform", "rngwp"), (2e4, 1e5, 4e5, 1e9))
    for split, ranks, memory in rules:
        problem = with_memory(
            make_problem(sharing, planning={"split": split, "ranks": ranks}), a=memory
        )
        assert {option.split for option in options(problem, "a")} == set(CUTS)
        found |= {plan.split for plan in plan_all(problem).plans.values()}

    assert found == set(CUTS)


@pytest.mark.parametrize("split", [2, 3, 4])
def test_a_cut_written_by_hand_is_refused_with_those_that_are_not(sharing: Any, split: int) -> None:
    """The message names the blocks that share, and where the model can be cut."""
    config = ServeConfig(model="m", default=DeviceSettings(split=split, batch_size=4, codec="int8"))

    with pytest.raises(ModelError) as caught:
        check_config(config, sharing[0])

    said = str(caught.value)
    assert said.startswith(f"default.split: {split}: block")
    assert "what block 1 has kept; the split can be 1 or less, or 5 or more" in said
    assert "\n" not in said
    assert caught.value.exit_code == 8


def test_a_smaller_plan_keeps_to_legal_cuts(sharing: Any) -> None:
    """A device that cannot hold its blocks gives up all that share with the first of them."""
    facts, _ = sharing
    settings = DeviceSettings(split="all", batch_size=1, micro_batch=1, codec="float32")
    planning = PlanningConfig(split="memory", ranks="fixed")
    config = ServeConfig(model="m", default=settings, planning=planning)
    problem = make_problem(sharing, config={"default": settings, "planning": planning})
    planner = Planner(config, facts, problem)
    planner.profiled("a", FAST)
    planner.begin(["a"])
    plan = planner.plan("a")
    assert plan is not None
    assert plan.split == BLOCKS

    less = smaller(config, facts, plan, plan.ranks)
    planner.missed("a")
    planner.missed("a")

    assert less is not None
    assert less.split == 1
    assert less.ranks.keys() == set(facts.weights(0, 1))
    assert planner.first == 1
    assert planner.server_ranks is not None
    assert planner.server_ranks.keys() == set(facts.weights(1, BLOCKS))


def test_token_ids_leave_a_device_only_with_its_labels(sharing: Any) -> None:
    """With `labels: device` a model whose blocks need the ids can be held whole, and not cut."""
    facts = replace(sharing[0], layout=replace(sharing[0].layout, shared=(), needs_ids=True))

    def check(labels: Any, split: Any) -> int:
        own = DeviceSettings(split=split, batch_size=4, codec="int8")
        return check_config(ServeConfig(model="m", labels=labels, default=own), facts)

    assert check("server", 2) == 2
    assert check("device", "all") == BLOCKS
    with pytest.raises(EdgeError, match="labels: server") as caught:
        check("device", 2)
    assert not isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 8


def test_what_later_blocks_need_of_the_front_counts_on_the_coordinator(sharing: Any) -> None:
    """Its parameters are part of the coordinator's memory; a device has them with its front."""
    facts, shape = sharing
    bytes_ = [
        server_base_bytes(make_problem((facts, replace(shape, late_params=n))), 1, {})
        for n in (0, 1000)
    ]
    holds_front = replace(shape, tail_needs_front=True)
    tied = [
        server_base_bytes(
            make_problem((facts, replace(holds_front, late_params=n)), config={"labels": "server"}),
            1,
            {},
        )
        for n in (0, 1000)
    ]

    assert bytes_[1] - bytes_[0] >= 4000
    assert tied[1] == tied[0]
