"""Train for a few steps, of which each has a higher rate than the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.config.centralised import PooledConfig
from coordinator.config.early_stopping import EarlyStoppingConfig
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.lab.centralised.trainer import POOLED, PooledTrainer
from coordinator.lab.rates.generated import generated_rows
from coordinator.lab.rates.suggestion import (
    Suggestion,
    SweepPoint,
    has_diverged,
    rates_of,
    smoothed,
    suggest,
)
from edge_sdk.errors import ConfigError, NumericError
from edge_sdk.protocol.messages import Stamp

# Fewer steps say nothing.
LEAST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Which rates are tried."""

    first: float = 1e-6
    last: float = 1.0
    steps: int = 100

    def __post_init__(self) -> None:
        if not 0.0 < self.first < self.last < 1e6:
            raise ConfigError(
                f"--from {self.first:g} --to {self.last:g}: must be above 0, and grow; the "
                "highest must be below 1e6"
            )
        if self.steps < LEAST_STEPS:
            raise ConfigError(f"--steps: must be at least {LEAST_STEPS}, got {self.steps}")


@dataclass(frozen=True)
class Sweep:
    """What was found, and on what."""

    points: list[SweepPoint]
    found: Suggestion
    data: str
    """What was trained on, in words."""
    batch_size: int
    """Sequences of a step."""


def find_rate(
    config: ServeConfig,
    wanted: SweepConfig,
    data: str | None = None,
    told: Callable[[SweepPoint], None] = lambda _point: None,
) -> Sweep:
    """Train the adapters of a run on the coordinator alone, with a rate that grows.

    Args:
        config: The run; its rates and its number of rounds do not count.
        wanted: Which rates are tried.
        data: A file to train on, read as `evaluation.data` says; None: the run's own `pooled` data,
            else its evaluation file, else generated texts.
        told: Hears of each step.

    Raises:
        ConfigError: a setting does not fit.
        DataError: something is wrong with the data.
        NumericError: not even the first steps can be computed.
    """
    pooled, words = _data(config, data)
    alone = replace(
        config,
        trained_by="coordinator",
        round_mode="synchronous",
        pooled=pooled,
        rounds=1,
        steps_per_round=wanted.steps,
        evaluation=EvaluationConfig(),
        early_stopping=EarlyStoppingConfig(),
    )
    model, dataset = ServerModel(alone), None
    if not pooled.sources:
        dataset = generated_rows(model.tokenizer, config.label_names, config.training.seed)
    trainer = PooledTrainer(alone, model, dataset)
    points = _points(trainer, wanted, told)
    if len(points) < LEAST_STEPS:
        raise NumericError(
            f"after {len(points)} steps, at a rate of {points[-1].rate:.1e}, nothing good comes of "
            "higher rates; lower --from"
            if points
            else f"not even a rate of {wanted.first:.1e} can be trained with"
        )
    found = suggest(points, is_whole=len(points) == wanted.steps)
    return Sweep(points, found, words, trainer.plan.batch_size)


def _data(config: ServeConfig, data: str | None) -> tuple[PooledConfig, str]:
    """Return where the training data is, and what it is in words."""
    pooled, own = config.pooled, config.evaluation.data
    if data is not None:
        changed = replace(own, path=data, validation=None, validation_fraction=0.0)
        return replace(pooled, data=changed, files=()), data
    if pooled.sources:
        return pooled, "the run's pooled data"
    if own.path is not None:
        return replace(pooled, data=own, files=()), "the run's evaluation file"
    return pooled, "generated texts"


def _points(
    trainer: PooledTrainer, wanted: SweepConfig, told: Callable[[SweepPoint], None]
) -> list[SweepPoint]:
    """Train, with a higher rate each step, until that leads nowhere."""
    training, optimizer = trainer.config.training, trainer.runtime.state.optimizer
    losses: list[float] = []
    points: list[SweepPoint] = []
    for step, rate in enumerate(rates_of(wanted.first, wanted.last, wanted.steps)):
        optimizer.go_by(
            replace(training, learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0)
        )
        try:
            report = trainer.train(Stamp(run="lr-find", device=POOLED, round=0, step=step))
        except NumericError:
            break
        losses.append(report.loss)
        if has_diverged(losses):
            break
        points.append(SweepPoint(rate, report.loss, report.loss))
        told(points[-1])
    means = smoothed([point.loss for point in points])
    return [replace(point, smoothed=mean) for point, mean in zip(points, means, strict=True)]
