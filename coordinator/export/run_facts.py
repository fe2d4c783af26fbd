"""The facts of a run, read from its folder, and which checkpoint holds the model that counts."""

from __future__ import annotations

import logging
from importlib import metadata

from coordinator.config.run import ServeConfig
from coordinator.export.facts import CurvePoint, RunFacts
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.steering.early_stopping import EarlyStopping, Verdict
from edge_sdk.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

PACKAGES = ("edgesplit", "torch", "transformers", "peft")


def run_facts(folder: RunFolder, result_round: int | None = None) -> RunFacts:
    """Read the facts of a run from its folder.

    Args:
        folder: Of the run.
        result_round: Rounds that were done when the model was what it is; None: all.
    """
    config = read_config(folder.path)
    history = RunHistory(folder)
    curve = []
    for row in history.metrics:
        score = overall(row)
        curve.append(
            CurvePoint(row["round"], row.get("train_loss"), None if score is None else score.loss)
        )
    done = history.rounds_done
    result_round = done if result_round is None else result_round
    verdict = best_of(folder, config)
    is_best = verdict is not None and verdict.best_round == result_round
    metric = config.early_stopping.metric_for_best_model
    test = history.test() or {}
    return RunFacts(
        label_names=config.label_names,
        method=f"preset {config.preset}" if config.preset else f"aggregation {config.aggregation}",
        is_pooled=config.trained_by == "coordinator",
        devices=len(history.devices()),
        rounds=done,
        steps=history.metrics[-1].get("step", 0) if history.metrics else 0,
        learning_rate=config.training.learning_rate,
        seed=config.training.seed,
        curve=tuple(curve),
        versions={name: metadata.version(name) for name in PACKAGES},
        result_round=result_round,
        best=f"{metric} {verdict.best:.4f}" if is_best and verdict is not None else "",
        test=test if test.get("round") == result_round else {},
    )


def best_of(folder: RunFolder, config: ServeConfig) -> Verdict | None:
    """Return which round's model is the best so far; None where the last one counts."""
    if not config.early_stopping.is_on:
        return None
    return EarlyStopping(folder, config.early_stopping).verdict()


def best_checkpoint(run: RunFolder, config: ServeConfig, done: int) -> Checkpoint | None:
    """Return the checkpoint of the run's best model; None where the newest one counts.

    Args:
        run: The run.
        config: Its config.
        done: Rounds that are done.
    """
    verdict = best_of(run, config)
    if verdict is None or verdict.best_round in (None, done):
        return None
    try:
        return run.checkpoint_of(verdict.best_round or 0, config.steps_per_round)
    except (ConfigError, StorageError) as error:  # removed by hand, or damaged: better than nothing
        log.warning("best.lost reason=%s; the newest model is the result", error)
        return None


def result_checkpoint(run: RunFolder, config: ServeConfig) -> Checkpoint:
    """Return the checkpoint of the model that is the run's result, or would be by now.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    newest = run.load_checkpoint()
    done = newest.state["step"] // config.steps_per_round
    return best_checkpoint(run, config, done) or newest
