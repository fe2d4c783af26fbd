"""The `buffered` section of a run's configuration: rounds in which nobody waits for anybody."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferedConfig:
    """When updates of devices are merged, and how much old ones count; `round_mode: buffered`."""

    size: int | None = None
    """Updates that are merged together, FedBuff's K; None: as many as there are devices, so that
    each merge moves what a round would. A fast device brings several of them."""
    max_staleness: int = 20
    """Merges that an update may have missed; a device that is further behind begins anew from what
    the others have learned by now, and what it has learned meanwhile is not used."""
    staleness_power: float = 0.5
    """The a in (1 + merges missed)^-a, by which an update counts less the older it is; 0: all
    count alike."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.max_staleness < 1:
            raise ValueError(f"max_staleness must be at least 1, got {self.max_staleness}")
        if not 0.0 <= self.staleness_power <= 10.0:
            raise ValueError(f"staleness_power must be in 0..10, got {self.staleness_power}")
