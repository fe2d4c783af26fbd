"""Which round's model is the best so far, and whether a run is to end: judged by its rows alone.

Whoever resumes a run finds the same rows, and so comes to the same judgement. The rule is that of
transformers' `EarlyStoppingCallback`, with rounds for evaluations: the best value is the best of
all, and patience begins anew where that is improved by more than the threshold. Row 0, from before
training, does not count, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from coordinator.config.early_stopping import EarlyStoppingConfig
from coordinator.results.history import overall
from coordinator.results.run_folder import RunFolder

METRICS = "metrics.jsonl"


class Verdict(NamedTuple):
    """What is known of a run so far."""

    best_round: int | None
    """Rounds that were done when the model was best; None: nothing is measured yet."""
    best: float
    """The metric then."""
    rounds_without: int
    """Rounds since the last improvement that counted."""
    stops: bool
    """Whether patience is at its end."""


def judge(rows: Iterable[Mapping[str, Any]], config: EarlyStoppingConfig) -> Verdict:
    """Return what *rows* of metrics, oldest first, say."""
    sign = -1.0 if config.metric_for_best_model == "eval_loss" else 1.0
    best_round, best, improved, last = None, math.nan, 0, 0
    for row in rows:
        score = overall(row) if row["round"] else None
        if score is None:
            continue
        last = row["round"]
        value = score.loss if config.metric_for_best_model == "eval_loss" else score.accuracy
        gain = math.inf if best_round is None else sign * (value - best)
        if math.isnan(value) or (best_round is not None and not gain > 0.0):
            improved = improved or last
            continue
        if best_round is None or gain > config.threshold:
            improved = last
        best_round, best = last, value
    without, patience = last - improved, config.patience_rounds
    return Verdict(best_round, best, without, patience is not None and without >= patience > 0)


class EarlyStopping:
    """Judges a run by the rows in its folder.

    Args:
        folder: The run's own.
        config: When it ends.
    """

    def __init__(self, folder: RunFolder, config: EarlyStoppingConfig) -> None:
        self._folder, self.config = folder, config

    def verdict(self, newest: Mapping[str, Any] | None = None) -> Verdict:
        """Return the best so far; *newest* is a row that is not written yet."""
        return judge(self._rows(newest), self.config)

    def ends_at(self, done: int, newest: Mapping[str, Any] | None = None) -> Verdict | None:
        """Return why a run ends when *done* rounds are; None where it goes on.

        What devices measure of a model is known when they train the next round; so their word on
        the newest one does not count yet, whether it is there or not.
        """
        if not self.config.is_on:
            return None
        rows = [r for r in self._rows(newest) if r["round"] < done or _is_ours(r, done)]
        found = judge(rows, self.config)
        return found if found.stops else None

    def _rows(self, newest: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = list(self._folder.rows(METRICS))
        if newest is None:
            return rows
        return [*(row for row in rows if row["round"] < newest["round"]), newest]


def _is_ours(row: Mapping[str, Any], done: int) -> bool:
    """Return whether the coordinator itself has measured the model of so many rounds."""
    return bool(row["round"] == done and "eval" in row)
