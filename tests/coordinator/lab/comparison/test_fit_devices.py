"""Which devices, splits and ranks a method gets, against trying all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings
from coordinator.lab.comparison.fit_devices import (
    device_set,
    fit,
    samples_of_a_step,
    whole_situation,
)
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.planning.costs import device_bytes
from coordinator.planning.problem import PlanningProblem
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig
from tests.e2e.cluster import save_model
from tests.tiny import BLOCKS

RANKS = (2, 4, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def make_run(model: Path, memory: dict[str, float], **settings: Any) -> SimulationConfig:
    """A fixed run whose devices have so much memory, with nothing kept free."""
    devices = {name: SimulatedDeviceConfig(memory_bytes=value) for name, value in memory.items()}
    return SimulationConfig(
        **{
            "model": str(model),
            "rounds": 12,
            "steps_per_round": 1,
            "max_length": 32,
            "default": DeviceSettings(split="all", batch_size=2),
            "lora": LoraConfig(r=8),
            "planning": PlanningConfig(rank_set=RANKS, memory_margin=0.0),
            "simulation": FleetConfig(devices=devices, overhead_bytes=0),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def problem(model: Path) -> PlanningProblem:
    """What memory is worked out from, for three devices."""
    return whole_situation(make_run(model, {"a": 1e9, "b": 1e9, "c": 1e9}))


def needed(problem: PlanningProblem, split: int, rank: int, **settings: Any) -> float:
    """Bytes of a device with so many blocks, where everybody has one rank."""
    lora, default = LoraConfig(r=rank), DeviceSettings(split=split, batch_size=2)
    config = replace(problem.config, lora=lora, default=default, **settings)
    now = replace(problem, config=config)
    return device_bytes(now, "a", split, dict.fromkeys(now.weights(0, split), rank))


def test_alike_devices_are_like_the_median(model: Path) -> None:
    """Board, link and memory of the middle one; names and data stay, own splits and ranks go."""
    fleet = FleetConfig(
        devices={
            "n": SimulatedDeviceConfig(board="jetson-nano", count=2),
            "x": SimulatedDeviceConfig(board="orin-nx-16gb", data="x.jsonl"),
            "y": SimulatedDeviceConfig(board="orin-nano-8gb", link="5g", data="y.jsonl"),
            "z": SimulatedDeviceConfig(board="agx-orin-64gb", data="z.jsonl"),
        }
    )
    own = {"x": DeviceSettings(split=2, r=4, batch_size=6)}
    config = make_run(model, {"a": 1}, simulation=fleet, devices=own)

    alike, as_they_are = device_set(config, "homogeneous"), device_set(config, "heterogeneous")

    devices = alike.simulation.devices
    assert list(devices) == ["n-0", "n-1", "x", "y", "z"] == list(as_they_are.simulation.devices)
    assert {(d.board, d.link, d.count) for d in devices.values()} == {("orin-nano-8gb", "5g", 1)}
    assert [d.data for d in devices.values()] == [None, None, "x.jsonl", "y.jsonl", "z.jsonl"]
    assert (alike.devices["x"].split, alike.devices["x"].r) == (None, None)
    assert alike.devices["x"].batch_size == 6
    assert as_they_are.devices["x"] == own["x"]
    assert as_they_are.simulation.devices["n-1"] == SimulatedDeviceConfig(board="jetson-nano")
    assert samples_of_a_step(alike) == samples_of_a_step(as_they_are) == 14


def test_who_cannot_hold_the_model_drops_out(model: Path, problem: PlanningProblem) -> None:
    """With a byte less than the smallest rank takes; the others make up for its samples."""
    least = needed(problem, BLOCKS, min(RANKS))
    run = make_run(model, {"a": least, "b": least - 1, "c": 1e9})

    fitted = fit(run)

    assert list(fitted.config.simulation.devices) == ["a", "c"]
    assert fitted.config.total_steps * samples_of_a_step(fitted.config) == 12 * 6
    assert fitted.notes[0].startswith("without b: 5 of 5 blocks need")
    assert fitted.config.settings("a").r == fitted.config.lora.r == 2
    assert fitted.notes[1] == "rank 2 instead of 8"
    assert fitted.peak_bytes("a", BLOCKS, dict.fromkeys(problem.facts.targets, 2)) <= least


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 1.1])
def test_one_cut_and_one_rank_are_the_most_that_the_weakest_holds(
    model: Path, problem: PlanningProblem, fraction: float
) -> None:
    """Of all cuts up to the configured one and all ranks of the set; tried one by one."""
    rule: dict[str, Any] = {"aggregation": "fedavg", "labels": "server"}
    low, high = needed(problem, 1, 2, **rule), needed(problem, 4, 8, **rule)
    budget = low + fraction * (high - low)
    default = DeviceSettings(split=4, batch_size=2)
    run = make_run(model, {"a": budget, "b": 1e9, "c": 1e9}, default=default, **rule)
    split = max(k for k in range(1, 5) if needed(problem, k, 2, **rule) <= budget)
    rank = max(r for r in RANKS if needed(problem, split, r, **rule) <= budget)

    fitted = fit(run)

    assert (fitted.config.settings("b").split, fitted.config.settings("b").r) == (split, rank)
    assert len(fitted.config.simulation.devices) == 3


def test_presets_with_ranks_of_their_own_take_the_largest_that_fit(
    model: Path, problem: PlanningProblem
) -> None:
    """Unless the settings of single devices say which rank each has."""
    memory = {"a": needed(problem, BLOCKS, 2, aggregation="zeropad") + 1, "b": 1e9}
    run = make_run(model, memory, preset="hetlora", aggregation="zeropad")
    pinned = replace(run, devices={"b": DeviceSettings(r=4)})

    assert fit(run).config.planning.ranks == "uniform"
    assert fit(pinned).config.planning.ranks == "fixed"
    assert fit(pinned).config.settings("b").r == 4


@pytest.mark.parametrize("per_round", [1, 2, 3, 5])
def test_drawn_rounds_count_the_samples_of_those_who_are_drawn(
    model: Path, problem: PlanningProblem, per_round: int
) -> None:
    """A step is the mean over all draws; who drops out costs no round, where enough are left."""
    sizes = {"a": 2, "b": 6, "c": 7}
    own = {name: DeviceSettings(batch_size=size) for name, size in sizes.items()}
    run = make_run(model, dict.fromkeys(sizes, 1e9), devices=own, devices_per_round=per_round)
    draws = list(combinations(sizes.values(), min(per_round, len(sizes))))
    alike = replace(run, devices={})
    least = needed(problem, BLOCKS, min(RANKS))
    small = SimulatedDeviceConfig(memory_bytes=least - 1)
    devices = {**alike.simulation.devices, "c": small}

    fitted = fit(replace(alike, simulation=replace(alike.simulation, devices=devices)))

    assert samples_of_a_step(run) == pytest.approx(sum(map(sum, draws)) / len(draws))
    assert fit(run).config.rounds == run.rounds
    assert list(fitted.config.simulation.devices) == ["a", "b"]
    assert fitted.config.rounds == (12 if per_round <= 2 else 18)


def test_a_plan_leaves_out_whom_it_cannot_fit(model: Path, problem: PlanningProblem) -> None:
    """Where planning chooses splits, a device drops out that cannot hold one block."""
    planning = PlanningConfig(split="armsc", ranks="rngwp", rank_set=RANKS, memory_margin=0.0)
    run = make_run(model, {"a": 1e9, "b": 1e5}, planning=planning)

    fitted = fit(run)

    assert list(fitted.config.simulation.devices) == ["a"]
    assert fitted.config.rounds == 24


def test_a_method_that_fits_nobody_is_one_line(model: Path) -> None:
    """It names what is needed and what there is."""
    with pytest.raises(ConfigError, match=r"cannot run on any device: 5 of 5 blocks need .* MiB"):
        fit(make_run(model, {"a": 1e5}))


def test_trained_numbers_are_those_of_the_factors(model: Path, problem: PlanningProblem) -> None:
    """Rank times both sides of each weight."""
    name, shape = next(iter(problem.facts.targets.items()))
    fitted = fit(make_run(model, {"a": 1e9}))

    assert fitted.num_trained({name: 3}) == 3 * (shape.num_outputs + shape.num_inputs)
