"""What may be told of a run to whoever reads its result: no data, and no names of devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

from coordinator.config.run import ServeConfig
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_folder import RunFolder

PACKAGES = ("edgesplit", "torch", "transformers", "peft")


class CurvePoint(NamedTuple):
    """The losses of a model after so many rounds; None where one was not measured."""

    round: int
    train_loss: float | None
    eval_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A run in numbers."""

    label_names: tuple[str, ...]
    """Classes of a classifier, in the order of their numbers."""
    method: str
    """Its preset, or how what devices have learned was joined."""
    is_pooled: bool
    """Whether the coordinator has trained on data of its own, without devices."""
    devices: int
    """Devices that have trained."""
    rounds: int
    """Aggregations that were done."""
    steps: int
    """Optimizer steps that were done."""
    learning_rate: float
    """Highest rate of the schedule."""
    seed: int
    """What decides all that is drawn."""
    curve: tuple[CurvePoint, ...]
    """Losses by round, oldest first."""
    versions: Mapping[str, str]
    """Versions of what has trained and written it, by package."""


def run_facts(config: ServeConfig, folder: RunFolder) -> RunFacts:
    """Read the facts of a run from its folder."""
    history = RunHistory(folder)
    curve = []
    for row in history.metrics:
        score = overall(row)
        curve.append(
            CurvePoint(row["round"], row.get("train_loss"), None if score is None else score.loss)
        )
    return RunFacts(
        label_names=config.label_names,
        method=f"preset {config.preset}" if config.preset else f"aggregation {config.aggregation}",
        is_pooled=config.trained_by == "coordinator",
        devices=len(history.devices()),
        rounds=history.rounds_done,
        steps=history.metrics[-1].get("step", 0) if history.metrics else 0,
        learning_rate=config.training.learning_rate,
        seed=config.training.seed,
        curve=tuple(curve),
        versions={name: metadata.version(name) for name in PACKAGES},
    )
