"""How far a comparison goes to find learning rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSearchConfig:
    """What is tried beyond `learning_rates`, by each method and for each set of devices."""

    most_trials: int = 8
    """Most further rates; 0: `learning_rates` alone."""
    factor: float | None = None
    """How many times further than the edge of the grid the next rate is, while the best one stands
    there. None: as far as the grid's last two rates are apart at that edge, at least 1.5; 4 where
    it has only one."""
    finest: float = 2.5
    """The search ends where the best rate's two neighbours are at most so many times above and
    below it; until then the gaps are halved on a logarithmic scale."""

    def __post_init__(self) -> None:
        if self.most_trials < 0:
            raise ValueError(f"most_trials must be at least 0, got {self.most_trials}")
        if self.factor is not None and not 1.1 <= self.factor <= 1e3:
            raise ValueError(f"factor must be from 1.1 to 1000, got {self.factor}")
        if not 1.1 <= self.finest < float("inf"):
            raise ValueError(f"finest must be at least 1.1, got {self.finest}")
