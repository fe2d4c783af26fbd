"""The runs of an experiment: each method, in each power mode, with each seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.experiment.completed_runs import digest
from coordinator.lab.experiment.config import (
    BoardConfig,
    ExperimentConfig,
    ExperimentSection,
    PowerModeConfig,
    cores,
    watts,
)
from coordinator.lab.experiment.planned_runs import planned_runs
from coordinator.lab.simulation.boards import catalogue

MODES = {"low": PowerModeConfig(speed=0.5, power=0.25), "high": PowerModeConfig()}


def config(modes: dict[str, PowerModeConfig], **settings: Any) -> ExperimentConfig:
    """Two emulated boards and a real one."""
    commands = {mode: f"nvpmodel {mode}" for mode in modes}
    boards = {
        "a": BoardConfig(emulated="orin-nano-8gb"),
        "b": BoardConfig(emulated="agx-orin-32gb", watts=12.0),
        "c": BoardConfig(ssh="me@c", power_commands=commands),
    }
    section = ExperimentSection(power_modes=modes, **settings)
    return ExperimentConfig(model="m", boards=boards, experiment=section)


def test_each_mode_and_seed_has_a_run() -> None:
    """In the order of the methods; what there is one of is not in the name."""
    plain = planned_runs({"m": config({}), "n": config({})}, Path("out"))
    many = planned_runs({"m": config(MODES, seeds=(3, 4))}, Path("out"))

    assert [(run.label, run.method, run.mode) for run in plain] == [
        ("m", "m", None),
        ("n", "n", None),
    ]
    assert [run.label for run in many] == ["m-low-3", "m-low-4", "m-high-3", "m-high-4"]
    assert [run.row for run in (plain[0], many[0])] == ["m", "m, low"]
    assert [run.config.training.seed for run in many] == [3, 4, 3, 4]
    assert {(run.config.runs, run.config.name) for run in many[:1]} == {(Path("out"), "m-low-3")}


def test_a_mode_changes_speed_and_power_of_emulated_boards() -> None:
    """By its shares; a real board has its command, and other modes make no other run of it."""
    low, high = planned_runs({"m": config(MODES)}, Path("out"))
    sheet = catalogue().boards["orin-nano-8gb"]

    assert cores(low.config) == {n: q / 2 for n, q in cores(config(MODES)).items()}
    assert (watts(low.config, "a"), watts(low.config, "b")) == (sheet.watts / 4, 3.0)
    assert (watts(high.config, "a"), watts(high.config, "b")) == (sheet.watts, 12.0)
    assert low.config.boards["c"].power_commands == {"low": "nvpmodel low"}
    (alone,) = planned_runs({"m": config({"low": MODES["low"]})}, Path("out"))
    assert digest(alone.config) == digest(low.config) != digest(high.config)


def test_modes_that_cannot_be_are_refused() -> None:
    """A real board without a command, a command without a mode, shares that are none."""
    with pytest.raises(ValueError, match=r"c\.power_commands lacks low, high"):
        ExperimentConfig(
            model="m",
            boards={"c": BoardConfig(ssh="me@c")},
            experiment=ExperimentSection(power_modes=MODES),
        )
    with pytest.raises(ValueError, match=r"power_commands has x, which is not in"):
        ExperimentConfig(
            model="m", boards={"c": BoardConfig(ssh="me@c", power_commands={"x": "true"})}
        )
    with pytest.raises(ValueError, match="power_commands means nothing to an emulated board"):
        BoardConfig(emulated="orin-nano-8gb", power_commands={"x": "true"})
    with pytest.raises(ValueError, match="speed must be above 0 and at most 1"):
        PowerModeConfig(speed=2.0)
