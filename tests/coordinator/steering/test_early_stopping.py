"""When nothing better is to be expected: judged as transformers does, by rows alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from coordinator.config.early_stopping import EarlyStoppingConfig
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.steering.early_stopping import judge


def row(round_: int, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    """A row of metrics with a score on the coordinator's file."""
    return {"round": round_, "eval": {"loss": loss, "accuracy": accuracy, "targets": 1}}


def as_transformers(values: list[float], config: EarlyStoppingConfig) -> int | None:
    """The evaluation, from 1, at which transformers' callback stops; None where it does not."""
    is_loss = config.metric_for_best_model == "eval_loss"
    args: Any = SimpleNamespace(
        metric_for_best_model=config.metric_for_best_model, greater_is_better=not is_loss
    )
    assert config.patience_rounds is not None
    callback = EarlyStoppingCallback(config.patience_rounds, config.threshold)
    state, control = TrainerState(), TrainerControl()
    for number, value in enumerate(values, start=1):
        metrics = {config.metric_for_best_model: value}
        callback.on_evaluate(args, state, control, metrics)
        best: Any = state.best_metric
        is_better = best is None or (value < best if is_loss else value > best)
        if is_better:  # as its Trainer does after each evaluation
            state.best_metric = value
        if control.should_training_stop:
            return number
    return None


@pytest.mark.parametrize("metric", ["eval_loss", "eval_accuracy"])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_it_stops_when_transformers_does(metric: Any, threshold: float) -> None:
    """Whatever the values, patience ends at the same evaluation as in transformers' Trainer."""
    draw = np.random.default_rng(0)
    ends = set()
    for patience in (1, 2, 4):
        config = EarlyStoppingConfig(
            patience_rounds=patience, metric_for_best_model=metric, threshold=threshold
        )
        for _ in range(40):
            values = np.round(1.0 + np.cumsum(draw.normal(-0.01, 0.05, 20)), 2).tolist()
            rows = [row(0, 9.0), *(row(n, v, v) for n, v in enumerate(values, start=1))]

            found = next((n for n in range(1, 21) if judge(rows[: n + 1], config).stops), None)

            assert found == as_transformers(values, config)
            ends.add(found)
    assert len(ends) > 5


def test_the_best_is_the_best_of_all() -> None:
    """The best round has the best value, be it better by less than the threshold."""
    config = EarlyStoppingConfig(patience_rounds=2, threshold=0.1)
    rows = [row(0, 0.1), row(1, 2.0), row(2, 1.95), row(3, 1.99)]

    found = judge(rows, config)

    assert (found.best_round, found.best, found.rounds_without, found.stops) == (2, 1.95, 2, True)


def test_rounds_count_and_not_evaluations() -> None:
    """Where every third round is evaluated, patience of three rounds ends at the next one."""
    config = EarlyStoppingConfig(patience_rounds=3)
    rows = [row(0, 3.0), row(3, 2.0), {"round": 4}, {"round": 5}, row(6, 2.1)]

    assert not judge(rows[:-1], config).stops
    assert judge(rows, config).stops


def test_what_is_no_number_is_no_improvement() -> None:
    """A loss that is not a number is never the best, and uses patience up."""
    config = EarlyStoppingConfig(patience_rounds=1)

    assert judge([row(0, 3.0), row(1, math.nan)], config).best_round is None
    found = judge([row(0, 3.0), row(1, 2.0), row(2, math.nan)], config)
    assert (found.best_round, found.stops) == (1, True)


def test_what_cannot_be_judged_is_refused() -> None:
    """Patience below a round, thresholds below 0 and runs without any evaluation are named."""
    for settings in ({"patience_rounds": 0}, {"threshold": -1.0}, {"threshold": math.nan}):
        with pytest.raises(ValueError, match=str(next(iter(settings)))):
            EarlyStoppingConfig(**settings)
    with pytest.raises(ValueError, match="nothing is measured"):
        ServeConfig(
            model="m",
            early_stopping=EarlyStoppingConfig(patience_rounds=1),
            evaluation=EvaluationConfig(on_devices=False),
        )
