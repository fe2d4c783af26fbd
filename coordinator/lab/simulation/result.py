"""The results of a simulation, round by round, read back from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.lab.simulation.timing import CLOCK, TRAFFIC
from coordinator.lab.simulation.traffic import Traffic, add_up
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_folder import RunFolder
from edge_sdk.protocol.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRound:
    """State of the run after so many rounds; row 0 is from before training."""

    round: int
    samples: int
    """Samples that all devices have trained on since the start."""
    seconds: float
    """Modelled seconds since the start."""
    bytes_up: int
    """Bytes from all devices since the start, in training only."""
    bytes_down: int
    energy_j: float
    """Joules that all devices have spent on computing since the start, as modelled."""
    train_loss: float | None
    """Mean loss per target over the round's steps."""
    loss: float | None
    """Loss on the coordinator's file, or else on all devices' validation data; None without any."""
    accuracy: float | None
    plans: dict[str, Plan]
    """Plan of each device in the round."""
    metrics: dict[str, Any]
    """The line of metrics.jsonl."""
    clock: dict[str, Any]
    """The line of clock.jsonl; empty in row 0."""
    traffic: Traffic
    """What the bytes of all devices were, since the start."""

    @property
    def perplexity(self) -> float | None:
        """exp(loss); it means something for language models."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A simulation that has ended."""

    outcome: str
    """`completed`, `paused` after Ctrl-C, or `stopped`."""
    folder: RunFolder
    rounds: list[SimulatedRound]


def read_result(
    outcome: str, folder: RunFolder, plans: Sequence[Mapping[str, Plan]]
) -> SimulationResult:
    """Join the rows of a run folder; *plans* are those of round 1, 2, ..."""
    history, times = RunHistory(folder), {row["round"]: row for row in folder.rows(CLOCK)}
    samples, up, down = history.samples(), 0, 0
    traffic = {row["round"]: row["devices"].values() for row in folder.rows(TRAFFIC)}
    so_far: Traffic = {}
    seconds, energy_j, rounds = 0.0, 0.0, []
    for metrics in history.metrics:
        number = metrics["round"]
        clock = times.get(number, {})
        devices = clock.get("devices", {}).values()
        up += sum(device["bytes_up"] for device in devices)
        down += sum(device["bytes_down"] for device in devices)
        energy_j += sum(device["energy_j"] for device in devices)
        so_far = add_up([so_far, *traffic.get(number, ())])
        seconds = clock.get("seconds", seconds)
        score = overall(metrics)
        rounds.append(
            SimulatedRound(
                round=number,
                samples=samples[number],
                seconds=seconds,
                bytes_up=up,
                bytes_down=down,
                energy_j=energy_j,
                train_loss=metrics.get("train_loss"),
                loss=None if score is None else score.loss,
                accuracy=None if score is None else score.accuracy,
                plans=dict(plans[number - 1]) if number else {},
                metrics=metrics,
                clock=clock,
                traffic=so_far,
            )
        )
    return SimulationResult(outcome, folder, rounds)
