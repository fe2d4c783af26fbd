"""The `pooled` section of a run's configuration: the data of a coordinator without devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.data.rows import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledConfig:
    """What is trained where the coordinator holds all data; read if it is `trained_by` that."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training data, as a device describes its own."""
    files: tuple[str, ...] = ()
    """Instead of `data.path`: several files or data sets, such as the devices' shards, all read as
    `data` says; what `validation_fraction` holds out, it holds out of each."""
    trains: Literal["adapters", "all"] = "adapters"
    """LoRA adapters in every block; or all weights, embeddings included."""
    batch_size: int | None = None
    """Sequences of one optimizer step; None: as many as the devices' steps have together."""
    micro_batch: int | None = None
    """Sequences that pass through the model together; None: the largest divisor of batch_size
    that is at most a device's batch_size."""

    def __post_init__(self) -> None:
        if self.files and self.data.path is not None:
            raise ValueError("give files or data.path, not both")
        for name in ("batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def sources(self) -> tuple[str | tuple[str, ...], ...]:
        """The files or data sets to train on, in their order."""
        return self.files or (() if self.data.path is None else (self.data.path,))
