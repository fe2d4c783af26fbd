"""What may be told of a run to whoever reads its result: no data, and no names of devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


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
    result_round: int = 0
    """Rounds that were done when the model was what it is here: all, or those of the best one."""
    best: str = ""
    """By what it was the best one; empty where the last model counts."""
    test: Mapping[str, float] = field(default_factory=dict)
    """What it does on a file that nothing was decided by, as `test_results.json` names it."""
