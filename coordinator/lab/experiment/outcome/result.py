"""Results of a run of an experiment, read back from its folder: learning, clocks, bytes, energy.

Every time is of a real clock. Energy is what boards had measured themselves at their last sign of
life before each evaluation; for an emulated board it is estimated as the data sheet's power times
the time in which it computed. Both cover the time from the first round to the last evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from coordinator.lab.comparison.cells import Held, Point, RunResult
from coordinator.lab.experiment.completed_runs import FACTS, HAPPENINGS, MARKS
from coordinator.lab.experiment.config import ExperimentConfig, watts
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_folder import RunFolder
from coordinator.results.session_counters import SessionCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardResult:
    """What one board did in a run."""

    name: str
    splits: tuple[int | str, ...]
    """Numbers of blocks that it held, in order of time."""
    compute_s: float
    bytes_up: int
    bytes_down: int
    """Bytes received, in training and joining."""
    link_s: float | None
    """Seconds in which the busier way of its relay was busy; None without a relay."""
    peak_bytes: int
    """Most resident memory of its program, in bytes."""
    peak_group_bytes: int | None
    """Most memory of its control group, in bytes."""
    killed_for_memory: int
    energy_j: float | None
    energy_is_estimated: bool
    starts: int
    tokens: int
    """Tokens that it trained on in this time."""
    power_mode: str | None
    """Its power mode; None where that is unknown."""
    rounds: int
    """Rounds in which it trained: not all, where a few boards are drawn for each."""
    trained_s: float
    """Seconds of these rounds."""
    trained_j: float | None
    """Joules in these rounds; None: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRunResult:
    """What one run measured."""

    label: str
    outcome: str
    seconds: float
    """Seconds from the beginning of the first round to the last evaluation."""
    coordinator_s: float
    """CPU seconds of the coordinator in this time."""
    boards: tuple[BoardResult, ...]
    cell: RunResult | None
    """Its row in a comparison; None if nothing was evaluated."""
    happenings: tuple[dict[str, Any], ...] = field(default=())
    """What happened to boards, oldest first; `run_s` is the time on the run's clock, in seconds, as
    that of the table: below 0 before the first round, and None where there was none."""
    ends_s: tuple[float, ...] = ()
    """When each round ended, on the run's clock."""

    def shares(self) -> dict[str, float]:
        """Return the busy share of every resource: boards, their links, the coordinator's CPU."""
        if not self.seconds:
            return {}
        spent_by = {f"{b.name} computes": b.compute_s for b in self.boards}
        spent_by |= {f"link of {b.name}": b.link_s for b in self.boards if b.link_s is not None}
        spent_by["coordinator"] = self.coordinator_s
        return {name: spent_s / self.seconds for name, spent_s in spent_by.items()}

    def slowest(self) -> tuple[str, float] | None:
        """Return the resource with the largest busy share, and that share."""
        return max(self.shares().items(), key=lambda item: item[1], default=None)


def read_run(folder: Path, config: ExperimentConfig, method: str) -> ExperimentRunResult:
    """Read the folder of one run.

    Args:
        folder: As `run_experiment` left it.
        config: Configuration of this run.
        method: Its name in the report.
    """
    run = RunFolder(folder)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    marks = run.rows(MARKS)
    history = RunHistory(run)
    boards = [_board(history, config, name, facts["boards"][name], marks) for name in config.boards]
    seconds = marks[-1]["time"] - marks[0]["time"] if marks else 0.0
    return ExperimentRunResult(
        label=folder.name,
        outcome=facts["outcome"],
        seconds=seconds,
        coordinator_s=marks[-1]["cpu_s"] - marks[0]["cpu_s"] if marks else 0.0,
        boards=tuple(boards),
        cell=_cell(history, config, method, marks) if marks and history.costs else None,
        happenings=tuple(
            row | {"run_s": row["time"] - marks[0]["time"] if marks else None}
            for row in run.rows(HAPPENINGS)
        ),
        ends_s=tuple(mark["time"] - marks[0]["time"] for mark in marks[1:]),
    )


def _board(
    history: RunHistory,
    config: ExperimentConfig,
    name: str,
    facts: Mapping[str, Any],
    marks: list[dict[str, Any]],
) -> BoardResult:
    # Without the round in which a run was stopped: clock and energy at its end are unknown.
    cost = history.cost(name, marks[-1]["round"] if marks else 0)
    is_emulated = config.boards[name].emulated is not None
    rounds = {row["round"] for row in history.costs if name in row["devices"]}
    ends = [(a, b) for a, b in pairwise(marks) if rounds & set(range(a["round"], b["round"]))]
    return BoardResult(
        name=name,
        splits=_splits(history, config, name),
        compute_s=cost.compute_s,
        bytes_up=cost.bytes_up,
        bytes_down=cost.bytes_down,
        link_s=_link_s(marks, name),
        peak_bytes=cost.peak_bytes,
        peak_group_bytes=facts["peak_group_bytes"],
        killed_for_memory=facts["killed_for_memory"],
        energy_j=_energy_j(history, config, name, marks),
        energy_is_estimated=is_emulated,
        starts=facts["starts"],
        tokens=cost.tokens,
        power_mode=facts.get("power_mode"),
        rounds=sum(round_ < marks[-1]["round"] for round_ in rounds) if marks else 0,
        trained_s=sum(after["time"] - before["time"] for before, after in ends),
        trained_j=_trained_j(history, config, name, marks, ends),
    )


def _trained_j(
    history: RunHistory,
    config: ExperimentConfig,
    name: str,
    marks: list[dict[str, Any]],
    ends: list[tuple[dict[str, Any], dict[str, Any]]],
) -> float | None:
    """Return the joules of a board between those marks in *ends*; None: unknown."""
    if config.boards[name].emulated is not None or len(ends) == len(marks) - 1:
        return _energy_j(history, config, name, marks)
    found = [_energy_j(history, config, name, list(pair)) for pair in ends]
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def _energy_j(
    history: RunHistory, config: ExperimentConfig, name: str, marks: list[dict[str, Any]]
) -> float | None:
    """Return the joules of a board from the first of *marks* to the last; None: unknown."""
    if config.boards[name].emulated is not None:
        # This machine's own meter cannot tell what an emulated board used.
        spent_s = history.cost(name, marks[-1]["round"] if marks else 0).compute_s
        return watts(config, name) * spent_s
    measured = [mark["energy_j"][name] for mark in marks if name in mark["energy_j"]]
    return _spent(measured) if len(measured) > 1 else None


def _spent(joules: list[float]) -> float:
    """Return the energy between readings of a counter that starts at 0 with the program.

    It leaves out what a program used between its last reading and its death.
    """
    counters = SessionCounters[float]()
    for reading in joules:
        counters.take("", {"energy": reading})
    return counters.total("energy") - joules[0]


def _link_s(marks: list[dict[str, Any]], name: str) -> float | None:
    usages = [mark["links"][name] for mark in marks if name in mark["links"]]
    if not usages:
        return None
    return float(max(usages[-1][way] - usages[0][way] for way in ("up_s", "down_s")))


def _splits(history: RunHistory, config: ExperimentConfig, name: str) -> tuple[int | str, ...]:
    planned = [row["plans"][name]["split"] for row in history.plans if name in row["plans"]]
    fixed = config.settings(name).split
    return tuple(dict.fromkeys(planned)) or (() if fixed is None else (fixed,))


# ---- for the comparison ----


def _cell(
    history: RunHistory, config: ExperimentConfig, method: str, marks: list[dict[str, Any]]
) -> RunResult | None:
    times = {mark["round"]: mark["time"] - marks[0]["time"] for mark in marks}
    samples, traffic = history.samples(), history.traffic()
    energy_j = {
        mark["round"]: _energy_of_all_j(history, config, marks[: index + 1])
        for index, mark in enumerate(marks)
    }
    points = tuple(
        Point(
            samples[done],
            times[done],
            times[done],
            *traffic.get(done, (0, 0)),
            *score,
            energy_j[done],
        )
        for row in history.metrics
        if (score := overall(row)) is not None and (done := row["round"]) in times
    )
    if not points:
        return None
    return RunResult(
        method=method,
        device_set=kind_of(config),
        seed=config.training.seed,
        rate=config.training.learning_rate,
        points=points,
        held=tuple(_held(history)),
        importance=tuple(
            (r["round"], r["importance"]) for r in history.plans if r.get("importance")
        ),
    )


def _energy_of_all_j(
    history: RunHistory, config: ExperimentConfig, marks: list[dict[str, Any]]
) -> float:
    """Return the joules of all boards until the last of *marks*; NaN if one of them is unknown."""
    if len(marks) < 2:
        return 0.0
    found = [_energy_j(history, config, name, marks) for name in config.boards]
    return sum(math.nan if each is None else each for each in found)


def _held(history: RunHistory) -> list[dict[str, Held]]:
    """Return the plans in force round by round, where something was planned."""
    rounds = map(history.plans_in, range(len(history.metrics) - 1))
    return [{name: _holding(plan) for name, plan in plans.items()} for plans in rounds if plans]


def _holding(plan: Mapping[str, Any]) -> Held:
    ranks = plan["ranks"].values()
    return Held(plan["split"], sum(ranks) / max(1, len(ranks)))


def kind_of(config: ExperimentConfig) -> str:
    """Return which boards there are: `real`, `emulated`, or both."""
    kinds = {"real" if board.ssh else "emulated" for board in config.boards.values()}
    return " and ".join(sorted(kinds, reverse=True))
