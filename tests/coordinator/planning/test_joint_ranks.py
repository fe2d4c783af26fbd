"""Ranks in whole plans: the best for their bytes, equal where they must be."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from coordinator.config.run import DeviceSettings
from coordinator.planning.costs import (
    device_base_bytes,
    device_bytes,
)
from coordinator.planning.fixed import check_config
from coordinator.planning.joint import plan_all
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from profiler.estimate.sizes import ModelShape
from tests.coordinator.planning.problems import SLOW, make_problem, model_of, priced, with_memory


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ranks_are_within_a_percent_of_the_best(
    llama: tuple[ModelFacts, ModelShape], dropout: float
) -> None:
    """Against every choice for the seven weights of a block that the estimate lets the device hold.

    Not against the knapsack's own prices: inputs that weights share are part of the estimate.
    """
    importance = {name: 1.0 + (i * 5) % 7 for i, name in enumerate(llama[0].targets)}
    problem = make_problem(
        llama,
        config={"default": DeviceSettings(split=1), "lora": LoraConfig(lora_dropout=dropout)},
        planning={"split": "fixed", "rank_set": (2, 8)},
        importance=importance,
        profiles={"a": SLOW},
    )
    names = problem.weights(0, 1)
    combinations = [
        dict(zip(names, ranks, strict=True)) for ranks in itertools.product((0, 2, 8), repeat=7)
    ]
    peaks = [device_bytes(problem, "a", 1, ranks) for ranks in combinations]
    values = [sum(importance[n] * math.log2(1 + r) for n, r in c.items()) for c in combinations]
    least = device_bytes(problem, "a", 1, dict.fromkeys(names, 2))
    for share in (0.0, 0.1, 0.4, 0.8):
        budget = least + share * (max(peaks) - least)

        plan = plan_all(with_memory(problem, a=budget + 1e-3)).plans["a"]

        best = max(value for value, peak in zip(values, peaks, strict=True) if peak <= budget)
        reached = values[combinations.index(plan.ranks)]
        assert device_bytes(problem, "a", 1, plan.ranks) <= budget
        assert reached >= 0.99 * best


def test_importance_moves_ranks_and_nothing_else_does(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """Under one budget the important kind of weight gets the higher ranks; its scale is nothing."""
    names = list(llama[0].targets)
    favourite = {name: 10.0 if "v_proj" in name else 1.0 for name in names}
    problem = make_problem(llama, config={"devices": {"a": DeviceSettings(split=2)}})
    base = device_base_bytes(problem, "a", 2)
    full = dict.fromkeys(problem.weights(0, 2), 4)
    room = base + priced(problem, full)
    problem = replace(with_memory(problem, a=room), importance=favourite)

    plan = plan_all(problem).plans["a"]

    assert {rank for name, rank in plan.ranks.items() if "v_proj" in name} == {8}
    assert min(rank for name, rank in plan.ranks.items() if "v_proj" not in name) < 8
    scaled = replace(problem, importance={n: 1e-6 * value for n, value in favourite.items()})
    assert plan_all(scaled).plans == plan_all(problem).plans


def test_equal_ranks_where_the_rule_needs_them(llama: tuple[ModelFacts, ModelShape]) -> None:
    """With fedavg everybody gets the largest rank that the smallest of them can hold."""
    problem = make_problem(
        llama, planning={"split": "fixed", "ranks": "uniform"}, config={"aggregation": "fedavg"}
    )
    names = problem.weights(0, 1)
    adapters = priced(problem, dict.fromkeys(names, 2))
    small = with_memory(problem, a=device_base_bytes(problem, "a", 1) + adapters)

    found = plan_all(small)

    everybody = [*(plan.ranks for plan in found.plans.values()), found.server_ranks]
    assert {rank for ranks in everybody for rank in ranks.values()} == {2}


@pytest.mark.parametrize(
    ("planning", "config", "message"),
    [
        (
            {"ranks": "rngwp"},
            {"aggregation": "fedavg"},
            r"planning.ranks: 'rngwp' .*'fedavg' cannot join; use 'fedex', or .*uniform",
        ),
        (
            {"ranks": "uniform"},
            {"aggregation": "fedavg", "devices": {"a": DeviceSettings(r=2)}},
            r"devices.a.r: aggregation 'fedavg' needs one rank for everybody",
        ),
        (
            {"split": "memory", "ranks": "fixed"},
            {"aggregation": "fedavg", "server_rank": 3},
            r"'fedavg' needs equal ranks, the config gives \[3, 4\]",
        ),
        ({"split": "armsc"}, {"aggregation": "zeropad"}, r"planning.split: 'armsc' .*'zeropad'"),
        ({"rank_set": (64,)}, {}, r"planning.rank_set: .* \[64\]; .* is 32"),
    ],
)
def test_plans_that_no_aggregation_could_join_are_refused(
    llama: tuple[ModelFacts, ModelShape],
    planning: dict[str, Any],
    config: dict[str, Any],
    message: str,
) -> None:
    """Before a run starts, with what to change."""
    problem = make_problem(llama, planning=planning, config=config)

    with pytest.raises(ConfigError, match=message):
        check_config(problem.config, problem.facts)


def test_a_shared_input_is_paid_by_whoever_keeps_it(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """With q alone adapted its input is kept for q alone; such plans fit their memory too."""
    problem = make_problem(
        llama,
        planning={"split": "fixed"},
        config={"default": DeviceSettings(split=2, batch_size=8)},
        importance={n: 1.0 if "q_proj" in n or "gate" in n else 0.0 for n in llama[0].targets},
        length=64,
    )
    base = device_base_bytes(problem, "a", 2)
    for share in range(1, 20):
        small = with_memory(problem, a=base + 20_000 * share, b=base + 9_000 * share)

        found = plan_all(small)

        for name, plan in found.plans.items():
            assert device_bytes(small, name, 2, plan.ranks) <= small.budget_bytes(name)
            assert not any(rank for n, rank in plan.ranks.items() if "k_proj" in n)
