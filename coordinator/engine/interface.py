"""What the coordinator asks of whatever computes its blocks: the `Engine` and its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Array
from edge_sdk.runtime.interface import TailSums


@dataclass(frozen=True)
class Job:
    """One micro-batch of one device, as it reaches the coordinator."""

    device: str
    split: int
    weight: float
    """Samples of the device's whole step; its share p_i is this over the sum of all devices'."""
    num_targets: int
    """Targets of the device's whole step."""
    hidden_BTD: Array
    lengths_B: np.ndarray
    labels: np.ndarray | None
    """None with `labels: device`."""


@dataclass(frozen=True)
class Answer:
    """What one device gets back."""

    device: str
    grad_BTD: Array
    sums: TailSums | None


class DeviceFault(NumericError):
    """A wave could not be computed because of what one device sent; the others may go on."""

    def __init__(self, device: str, text: str) -> None:
        super().__init__(text)
        self.device = device


class Engine(Protocol):
    """What the coordinator asks of whatever computes its blocks."""

    def train(self, jobs: Sequence[Job], step: int, micro: int) -> list[Answer]:
        """Forward, loss and backward of a wave whose labels are here."""
        ...

    def lift(self, jobs: Sequence[Job], step: int, micro: int) -> dict[str, Array]:
        """Forward of a wave whose labels stay on the devices; the graph is kept."""
        ...

    def lower(self, grads: Mapping[str, Array]) -> list[Answer]:
        """Backward of the last `lift` from each device's gradient of its own loss."""
        ...

    def finish_step(self, step: int) -> bool:
        """Update the adapters; False when a gradient was not finite and nothing was changed."""
        ...
