"""The facts of a run, read from its folder."""

from __future__ import annotations

from importlib import metadata

from coordinator.export.facts import CurvePoint, RunFacts
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import RunFolder

PACKAGES = ("edgesplit", "torch", "transformers", "peft")


def run_facts(folder: RunFolder) -> RunFacts:
    """Read the facts of a run from its folder."""
    config = read_config(folder.path)
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
