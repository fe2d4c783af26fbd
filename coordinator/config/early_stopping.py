"""The `early_stopping` section of a run's configuration: when nothing better is to be expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStoppingConfig:
    """When a run ends before its last round, and that its best model counts, not its last one.

    What is measured is the coordinator's file or, without one, the devices' data, each target
    alike; what devices find is known a round later.
    """

    patience_rounds: int | None = None
    """Rounds without an improvement after which the run ends; None: it goes to its last round, and
    its last model counts. With a number, the model of the round that was best is kept, and is the
    result, wherever the run ends."""
    metric_for_best_model: Literal["eval_loss", "eval_accuracy"] = "eval_loss"
    """What is to improve; perplexity does so when the loss does."""
    threshold: float = 0.0
    """How much better than the best so far a value must be to count as an improvement."""

    def __post_init__(self) -> None:
        if self.patience_rounds is not None and self.patience_rounds < 1:
            raise ValueError(f"patience_rounds must be at least 1, got {self.patience_rounds}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0.0):
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")

    @property
    def is_on(self) -> bool:
        """Whether the best model counts."""
        return self.patience_rounds is not None
