"""Whole plans: within every budget, and no other has a shorter wave."""

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
    options,
    server_side,
)
from coordinator.planning.fixed import make_plan, plan_device, plan_server
from coordinator.planning.joint import plan_all
from coordinator.planning.objective import wave_seconds
from coordinator.planning.problem import ServerProfile, planning_length
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import estimate_memory, hidden_bytes
from profiler.estimate.sizes import ModelShape, Work
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import (
    FAST,
    SLOW,
    make_problem,
    model_of,
    priced,
    with_memory,
)
from tests.tiny import BLOCKS, CLASSES, task_of

MIB = 2**20


@pytest.fixture(scope="module")
def llama() -> tuple[ModelFacts, ModelShape]:
    """A tiny Llama of 5 blocks."""
    return model_of("llama")


# ---- what was there before ----


def test_a_fixed_config_is_planned_as_ever(llama: tuple[ModelFacts, ModelShape]) -> None:
    """Whatever a device says of itself, it gets split and rank of the config."""
    problem = make_problem(
        llama,
        planning={"split": "fixed", "ranks": "fixed"},
        config={"devices": {"a": DeviceSettings(split=3, r=2)}},
        profiles={"a": DeviceProfile(memory_bytes=1.0), "b": DeviceProfile(memory_bytes=-1.0)},
    )
    config, facts = problem.config, problem.facts

    found = plan_all(problem)

    assert found.plans == {name: plan_device(config, facts, name) for name in "ab"}
    assert found.server_ranks == plan_server(config, facts, 1)
    assert found.refused == {}


def test_a_forward_only_device_is_planned_as_one(llama: tuple[ModelFacts, ModelShape]) -> None:
    """Rank 0: the config's split, and neither memory nor time for a backward pass or a gradient."""
    changes = {"config": {"devices": {"a": DeviceSettings(r=0)}, "labels": "server"}}
    problem = make_problem(llama, **changes)

    found = plan_all(problem)

    plan, story = found.plans["a"], found.explanation.devices["a"]
    assert (plan.split, plan.is_forward_only, found.plans["b"].is_forward_only) == (1, True, False)
    shape = llama[1]
    work = Work(
        first=0,
        stop=1,
        has_front=True,
        has_tail=False,
        ranks=plan.ranks,  # frozen residuals of what the other device learns
        residual_rank=problem.residual_rank,
        folds_residual=True,
        micro_batch=2,
        length=16,
    )
    hidden = hidden_bytes(shape, 2, 16, codec_bytes=2)
    assert story.device_s == pytest.approx(
        estimate_flops(shape, work).forward / 1e7 + hidden / 1e6 + 0.05
    )
    assert estimate_memory(shape, work).activations == 0


def test_all_blocks_without_a_rank_are_refused(llama: tuple[ModelFacts, ModelShape]) -> None:
    """A device that held the whole model forward only would train nothing."""
    device = DeviceSettings(r=0, split="all")
    problem = make_problem(llama, config={"devices": {"a": device}})

    with pytest.raises(ConfigError, match="trains nothing"):
        plan_device(problem.config, problem.facts, "a")


# ---- budgets ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("ranks", ["uniform", "rngwp"])
@pytest.mark.parametrize("split", ["armsc", "memory", "fixed"])
@pytest.mark.parametrize("labels", ["device", "server"])
def test_every_plan_fits_its_budget(family: str, ranks: str, split: str, labels: str) -> None:
    """Predicted peaks of devices and coordinator stay within what they may use."""
    config: dict[str, Any] = {"labels": labels}
    if task_of(family) == "sequence-classification":
        names = tuple(str(i) for i in range(CLASSES))
        config |= {"task": "sequence-classification", "label_names": names}
    roomy = make_problem(model_of(family), planning={"ranks": ranks, "split": split}, config=config)
    rows = options(roomy, "a")
    for least in (rows[0].device_bytes, (rows[1].device_bytes + rows[2].device_bytes) / 2):
        problem = with_memory(roomy, a=least, b=1.01 * least)

        found = plan_all(problem)

        assert sorted(found.plans) == ["a", "b"]
        for name, plan in found.plans.items():
            peak = device_bytes(problem, name, plan.split, plan.ranks)
            assert peak == found.explanation.devices[name].planned_bytes
            assert peak <= problem.budget_bytes(name) * (1 + 1e-12)
            assert plan.ranks.keys() == set(problem.weights(0, plan.split))
            assert plan.tail is (labels == "device" or plan.split == BLOCKS)
            assert any(plan.ranks.values())
        first = min(plan.split for plan in found.plans.values())
        assert found.server_ranks.keys() == set(problem.weights(first, BLOCKS))
        server = found.explanation.server
        assert server.planned_bytes <= server.budget_bytes


def test_bytes_are_the_profiler_s_estimate(llama: tuple[ModelFacts, ModelShape]) -> None:
    """A device's peak is the estimate of its own slice, batch, ranks and process."""
    problem = make_problem(llama, config={"aggregation": "fedavg"}, planning={"ranks": "uniform"})
    profile = replace(SLOW, overhead_bytes=5e6, base_bytes=2.0, compute_bytes=2.0, linear_bytes=2.0)
    problem = replace(problem, profiles={"a": profile})
    ranks = dict.fromkeys(problem.weights(0, 2), 4)
    work = Work(
        first=0,
        stop=2,
        has_front=True,
        has_tail=True,
        ranks=ranks,
        micro_batch=2,
        in_flight=2,
        length=16,
        base_bytes=2,
        compute_bytes=2,
        linear_bytes=2.0,
    )

    assert (
        device_bytes(problem, "a", 2, ranks)
        == estimate_memory(problem.model, work, 5_000_000).total
    )


@pytest.mark.parametrize("is_half", [False, True])
def test_adapters_are_priced_on_top_of_a_split(
    llama: tuple[ModelFacts, ModelShape], is_half: bool
) -> None:
    """Base and adapters sum to the estimate, whatever the ranks: the knapsack's prices are true."""
    problem = make_problem(llama)
    profiles = {"a": replace(SLOW, base_bytes=2.0, compute_bytes=2.0), "b": FAST}
    problem = replace(problem, profiles=profiles) if is_half else problem
    names = problem.weights(0, 3)
    for ranks in (
        dict.fromkeys(names, 1),
        dict.fromkeys(names, 8),
        {name: (1, 2, 4, 8)[i % 4] for i, name in enumerate(names)},
    ):
        base = device_base_bytes(problem, "a", 3)
        adapters = priced(problem, ranks)

        assert base + adapters == pytest.approx(device_bytes(problem, "a", 3, ranks), rel=5e-3)


def test_the_cap_makes_adapters_equally_large(llama: tuple[ModelFacts, ModelShape]) -> None:
    """`planning.adapter_bytes` holds on every device, however much memory is left."""
    problem = make_problem(llama)
    names = problem.weights(0, 2)
    cap = priced(problem, dict.fromkeys(names, 4))
    for ranks in ("uniform", "rngwp"):
        devices = {name: DeviceSettings(split=2) for name in "ab"}
        capped = make_problem(
            llama, planning={"ranks": ranks, "adapter_bytes": cap}, config={"devices": devices}
        )

        found = plan_all(capped).explanation.devices

        assert all(0.9 * cap < story.adapter_bytes <= cap for story in found.values())


# ---- split points ----


@pytest.mark.parametrize("server_flops", [2e7, 1e8, 1e9])
def test_no_other_splits_have_a_shorter_wave(
    llama: tuple[ModelFacts, ModelShape], server_flops: float
) -> None:
    """Against every combination of splits of three unequal devices, priced afresh."""
    problem = make_problem(
        llama,
        planning={"ranks": "fixed"},
        profiles={"a": SLOW, "b": FAST, "c": replace(FAST, flops_per_s=1e8)},
        server=ServerProfile(memory_bytes=1e9, flops_per_s=server_flops),
    )
    problem = with_memory(problem, c=options(problem, "c")[2].device_bytes)
    config, facts = problem.config, problem.facts

    found = plan_all(problem)

    waves = []
    for splits in itertools.product(range(1, BLOCKS + 1), repeat=3):
        plans = {
            name: make_plan(config, facts, name, split, dict.fromkeys(problem.weights(0, split), 4))
            for name, split in zip("abc", splits, strict=True)
        }
        ranks = dict.fromkeys(problem.weights(min(splits), BLOCKS), 4)
        if plans["c"].split <= 3:
            waves.append(wave_seconds(problem, plans, ranks))
    assert found.wave_s == pytest.approx(min(w for w in waves if w is not None), rel=1e-12)


def test_a_device_of_unknown_speed_goes_by_memory(llama: tuple[ModelFacts, ModelShape]) -> None:
    """The deepest split that fits, said in a note; the others are planned by time as before."""
    unknown = {"flops_per_s": None, "up_bytes_per_s": None, "down_bytes_per_s": None}
    for field in unknown:
        problem = make_problem(
            llama,
            profiles={"a": replace(SLOW, flops_per_s=1e3), "b": replace(SLOW, **{field: None})},
            # With two, all blocks take less than four: a device that has them all never waits.
            config={"default": DeviceSettings(split=1, batch_size=4, in_flight=1)},
        )
        problem = with_memory(problem, b=options(problem, "b")[3].device_bytes * 1.001)

        found = plan_all(problem)

        assert (found.plans["a"].split, found.plans["b"].split) == (1, 4)
        assert found.explanation.devices["a"].binding == "time"
        assert found.explanation.devices["b"].notes == (
            f"{field} unknown: only memory decides its split",
        )
        assert found.wave_s is None


def test_a_coordinator_of_unknown_speed_takes_what_is_left(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """Without its speed the rule is the memory rule."""
    unknown = make_problem(llama, server=ServerProfile())
    by_memory = make_problem(llama, planning={"split": "memory"}, server=ServerProfile())

    assert plan_all(unknown).plans == plan_all(by_memory).plans
    assert any("server_flops_per_s" in note for note in plan_all(unknown).explanation.notes)


def test_a_device_of_unknown_memory_runs_what_the_config_says(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """Nothing can be chosen for it; no rank exceeds the config's either."""
    problem = make_problem(llama, profiles={"a": DeviceProfile(), "b": FAST})

    found = plan_all(problem)

    assert found.plans["a"].split == 1
    assert set(found.plans["a"].ranks.values()) == {4}
    assert set(found.plans["b"].ranks.values()) == {8}
    assert "memory unknown" in found.explanation.devices["a"].notes[0]


def test_own_settings_win(llama: tuple[ModelFacts, ModelShape]) -> None:
    """`split` and `r` of a device, rank patterns and `server_rank` are not ours to choose."""
    problem = make_problem(
        llama,
        config={
            "devices": {"a": DeviceSettings(split=2, r=3), "b": DeviceSettings(split="all")},
            "lora": LoraConfig(rank_pattern={"q_proj": 5}),
            "server_rank": 6,
        },
    )

    found = plan_all(problem)

    assert (found.plans["a"].split, found.plans["b"].split) == (2, BLOCKS)
    assert found.explanation.devices["a"].binding == "fixed"
    for ranks, other in ((found.plans["a"].ranks, 3), (found.server_ranks, 6)):
        assert all(r == (5 if n.endswith("q_proj") else other) for n, r in ranks.items())
    assert {r for n, r in found.plans["b"].ranks.items() if n.endswith("q_proj")} == {5}


def test_the_last_block_brings_the_tail_along() -> None:
    """With `labels: server` all blocks on the device take the head's memory too, or stay away."""
    problem = make_problem(
        model_of("gpt2", vocab_size=5000), planning={"split": "memory"}, config={"labels": "server"}
    )
    rows = options(problem, "a")
    without, whole = rows[-2].device_bytes, rows[-1].device_bytes
    block = rows[1].device_bytes - rows[0].device_bytes
    assert whole - without > 1.2 * block

    found = plan_all(with_memory(problem, a=without + 1.1 * block, b=whole))

    assert [found.plans[name].split for name in "ab"] == [BLOCKS - 1, BLOCKS]


# ---- refusals ----


def test_a_profile_that_cannot_be_true_costs_only_its_device(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """It is left out with the reason; the others are planned without it."""
    nonsense = replace(SLOW, flops_per_s=math.inf, up_bytes_per_s=-3.0)

    found = plan_all(make_problem(llama, profiles={"a": nonsense, "b": FAST}))

    assert found.refused == {
        "a": "its profile cannot be true: flops_per_s is inf; up_bytes_per_s is -3.0"
    }
    assert sorted(found.plans) == ["b"]


def test_a_device_too_small_for_one_block_is_refused(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """Device, bytes that one block takes and bytes that there are stand in the reason."""
    problem = make_problem(llama)
    needed = options(problem, "a")[0].device_bytes

    found = plan_all(with_memory(problem, a=0.5 * needed))

    assert sorted(found.plans) == ["b"]
    for words in ("device 'a'", f"needs {needed / MIB:,.1f} MiB", f"{0.5 * needed / MIB:,.1f} MiB"):
        assert words in found.refused["a"]


def test_nobody_left_is_an_empty_plan(llama: tuple[ModelFacts, ModelShape]) -> None:
    """Nobody to plan for is no crash."""
    found = plan_all(make_problem(llama, profiles={"a": replace(SLOW, memory_bytes=1.0)}))

    assert (found.plans, found.server_ranks, found.wave_s) == ({}, {}, 0.0)
    assert sorted(found.refused) == ["a"]


def test_a_coordinator_that_is_too_small_stops_everything(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """Its bytes, and which key to change."""
    problem = make_problem(llama, planning={"server_memory_bytes": 1000.0})
    problem = with_memory(problem, a=options(problem, "a")[0].device_bytes)

    with pytest.raises(ConfigError, match=r"blocks 1..4 .*planning.server_memory_bytes"):
        plan_all(problem)


def test_evaluation_keeps_the_whole_model_on_the_coordinator(
    llama: tuple[ModelFacts, ModelShape],
) -> None:
    """With a file to evaluate, deep splits spare it no weights."""
    data = DataConfig(path="dev.jsonl")  # type: ignore[arg-type]
    plain = make_problem(llama)
    config = replace(plain.config, evaluation=replace(plain.config.evaluation, data=data))

    base = server_side(replace(plain, config=config)).base_bytes

    model = plain.model
    weights = BLOCKS * model.block_params + model.front_params + model.tail_params
    assert min(base) >= 4 * weights
    assert server_side(plain).base_bytes[-1] == 0.0


def test_length_to_plan_for(llama: tuple[ModelFacts, ModelShape]) -> None:
    """What the config says, else what the model takes, but not 100,000 tokens."""
    config = make_problem(llama).config

    assert planning_length(replace(config, max_length=7), 64) == 7
    assert planning_length(config, 64) == 64
    assert planning_length(config, 131_072) == 1024
