"""Bytes and time of a run by the planner's own estimates, beside numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.commands.readiness.forecast import forecast, wave_bytes
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.costs import device_seconds
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.problem_files import read_problem
from edge_sdk.lora.targets import LoraConfig
from profiler.profile import DeviceProfile
from tests.tiny import BLOCKS, make_config

PROFILE = DeviceProfile(
    memory_bytes=1e9,
    overhead_bytes=1e6,
    flops_per_s=1e8,
    up_bytes_per_s=1e6,
    down_bytes_per_s=2e6,
    round_trip_s=0.01,
)
LENGTH, ROUNDS, STEPS, BATCH, MICRO = 16, 3, 5, 8, 4


def problem_of(model: Path, **settings: object) -> PlanningProblem:
    """A run of one device with two blocks, and of one with all of them."""
    config = ServeConfig(
        model=str(model),
        max_length=LENGTH,
        rounds=ROUNDS,
        steps_per_round=STEPS,
        lora=LoraConfig(target_modules=("q_proj",), r=2),
        default=DeviceSettings(batch_size=BATCH, micro_batch=MICRO),
        devices={"cam": DeviceSettings(split=2), "whole": DeviceSettings(split="all")},
    )
    config = replace(config, **settings)  # type: ignore[arg-type]
    return read_problem(config, {"cam": PROFILE, "whole": PROFILE}, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that holds a config and nothing else."""
    make_config("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("codec", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(("labels", "times"), [("server", 1), ("device", 2)])
def test_the_bytes_of_a_run(codec: str, width: int, labels: str, times: int, model: Path) -> None:
    """Hidden states and gradients of every micro-batch, adapters of every round, both ways."""
    default = DeviceSettings(batch_size=BATCH, micro_batch=MICRO, codec=codec)
    problem = problem_of(model, default=default, labels=labels)
    hidden, features = problem.model.hidden_size, make_config("llama").hidden_size

    found = forecast(problem, plan_all(problem)).devices

    wave = MICRO * LENGTH * hidden * width * times
    block = 4 * 2 * (features + features)  # float32, rank 2, A and B of a square q_proj
    assert found["cam"].up_bytes == wave * (BATCH // MICRO) * ROUNDS * STEPS + 2 * block * ROUNDS
    assert found["cam"].down_bytes == found["cam"].up_bytes
    assert found["whole"].up_bytes == found["whole"].down_bytes == BLOCKS * block * ROUNDS


def test_bytes_and_seconds_of_a_link_agree(model: Path) -> None:
    """What the planner counts as time on the link is these bytes at the link's rates."""
    problem = problem_of(model)
    plan = plan_all(problem).plans["cam"]
    up, down = (wave_bytes(problem, "cam", plan, way) for way in ("up", "down"))

    far = replace(PROFILE, flops_per_s=1e18, round_trip_s=0.0)
    seconds = device_seconds(
        replace(problem, profiles={**problem.profiles, "cam": far}), "cam", 2, plan.ranks
    )

    assert seconds == pytest.approx(up / 1e6 + down / 2e6, rel=1e-6)


def test_the_time_of_a_run_is_that_of_its_waves(model: Path) -> None:
    """Known only when every speed is; otherwise each unknown is named with its reason."""
    unknown = problem_of(model)
    planning = replace(unknown.config.planning, server_flops_per_s=1e9)
    known = problem_of(model, planning=planning)

    found, before = plan_all(known), forecast(unknown, plan_all(unknown))
    after = forecast(known, found)

    assert before.run_s is None
    (unknown_line,) = before.unknown
    assert unknown_line.startswith("the coordinator's speed, which it measures when it serves")
    assert found.wave_s is not None
    assert after.run_s == pytest.approx(found.wave_s * (BATCH // MICRO) * ROUNDS * STEPS)
    assert after.unknown == ()
    own = found.explanation.devices["cam"].device_s
    assert own is not None
    assert after.devices["cam"].own_s == pytest.approx(own * (BATCH // MICRO) * ROUNDS * STEPS)
