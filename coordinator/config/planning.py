"""The `planning` section of a run's configuration: who chooses split points and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig:
    """How split points and ranks are found; a device's own `split` and `r` always win."""

    split: Literal["fixed", "armsc", "memory"] = "fixed"
    """`fixed`: as in `default` and `devices`; `armsc`: water-filling over memory, speed, links and
    the coordinator; `memory`: the deepest that fits the device's memory (the paper's reading)."""
    ranks: Literal["fixed", "uniform", "rngwp"] = "fixed"
    """`fixed`: as in `default` and `devices`; `uniform`: the largest one rank that fits the
    device; `rngwp`: by importance per byte, weight by weight."""
    min_split: int = 1
    """Least blocks that a device runs: no plan gives it fewer, whoever chooses split points, and a
    config that asks for fewer is refused. `coordinator audit-privacy` names one."""
    rank_set: tuple[int, ...] = (2, 4, 8, 16)
    """Ranks that a weight may have beside 0; the paper's Q."""
    utility: Literal["log", "sqrt", "linear"] = "log"
    """What rank r is worth: log2(1 + r), sqrt(r) or r, times the importance (ours: the paper's
    is unknown)."""
    server_memory_bytes: float | None = None
    """Bytes of memory of the coordinator for this run; None: what its machine has available."""
    server_flops_per_s: float | None = None
    """Speed of the coordinator in operations a second; None: measured when the run starts."""
    importance: Literal["free", "reference", "signed"] = "free"
    """`free`: sum_t |<d_t, W x_t>|; `reference`: sum_j |w_j g_j|; `signed`: |sum_j w_j g_j|,
    the other reading of the paper's formula."""
    importance_every: int = 10
    """Steps between two measurements of importance."""
    replan: bool = True
    """Whether plans may change between rounds."""
    drift: float = 0.2
    """Relative change of global importance, in the mean over the weights, that asks for a new
    plan; the paper's threshold (its value is unknown)."""
    min_gain: float = 0.05
    """Relative gain (of wave time or of utility) below which the old plan stays."""
    memory_margin: float = 0.1
    """Part of each memory budget that plans leave free."""
    deadline_s: float | None = None
    """Seconds that a micro-batch may take a device, compute and link: no split is chosen that takes
    longer, and a device that is slower at every split computes forward only. None: no limit."""
    adapter_bytes: float | None = None
    """Device bytes for adapters, where they are to be the same whatever the device; None: what
    its memory leaves."""

    @property
    def measures_importance(self) -> bool:
        """Whether ranks depend on the importance of weights, which devices then measure."""
        return self.ranks == "rngwp"

    def __post_init__(self) -> None:
        ranks = self.rank_set
        if not ranks or any(rank < 1 for rank in ranks) or len(set(ranks)) < len(ranks):
            raise ValueError(f"rank_set must hold different ranks of at least 1, got {list(ranks)}")
        for name in ("importance_every", "min_split"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("drift", "min_gain", "memory_margin"):
            most = 1.0 if name == "memory_margin" else 1e9
            if not 0.0 <= getattr(self, name) < most:
                raise ValueError(
                    f"{name} must be at least 0 and below {most:g}, got {getattr(self, name)}"
                )
        for name in ("server_memory_bytes", "server_flops_per_s", "deadline_s", "adapter_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
