"""What computes the coordinator's blocks: this process, or actors on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Where the coordinator's blocks are computed, and over how many processes."""

    kind: Literal["local", "ray"] = field(default="local", metadata={"word": True})
    """`local`: in the coordinator's own process; `ray`: in actors on a Ray cluster, stages x
    replicas of them, which needs the extra `ray`; see docs/ray.md. `engine: ray` says it in a
    word."""
    stages: int = 1
    """Actors in a row that share the blocks: each holds, and computes, a stretch of them. A model
    that can be cut in fewer places has fewer."""
    replicas: int = 1
    """Such rows side by side, each with all of the coordinator's blocks: they share the rows of a
    wave, and add up their gradients at the end of a step."""
    address: str | None = None
    """HOST:PORT of a Ray cluster that is there, or `auto` for the one of this machine; None: one is
    started on this machine, and stopped with the run."""
    cpus_per_actor: float = 1.0
    """CPUs of each actor, and threads of its computation; a part of one may be shared."""
    gpus_per_actor: float | None = None
    """GPUs of each actor, a part of one where several share it. None: one where the cluster has
    GPUs and `device` is not `cpu`, else none."""

    def __post_init__(self) -> None:
        for name in ("stages", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if self.kind == "local" and getattr(self, name) > 1:
                raise ValueError(f"{name}: {getattr(self, name)} needs kind: ray")
        if not self.cpus_per_actor > 0:
            raise ValueError(f"cpus_per_actor must be above 0, got {self.cpus_per_actor}")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            amount = getattr(self, name) or 0
            if amount < 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name} must be a part of 1 or a whole number, got {amount}")
        if self.address is not None and "://" in self.address:
            raise ValueError(
                f"address must be HOST:PORT or auto, got {self.address!r}: the coordinator joins "
                "the cluster itself, not by Ray's client"
            )

    @property
    def num_actors(self) -> int:
        """Actors at most."""
        return self.stages * self.replicas
