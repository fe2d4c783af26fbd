"""What a device can do with its slice, whatever computes it: the `Runtime` interface.

Knows no network. `torch_runtime.py` is the torch implementation; arrays cross this border as numpy,
so that a runtime without torch can stand beside it.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.importance import Form
from profiler.sensors.memory import peak_rss, rss


class Micro(NamedTuple):
    """One micro-batch, padded on the right."""

    input_ids: np.ndarray
    """(B, T) int64."""
    lengths: np.ndarray
    """(B,) int32."""
    labels: np.ndarray
    """(B, T) int64 with -100 where no loss is taken, or (B,) classes."""


class TailSums(NamedTuple):
    """What the tail found for one micro-batch."""

    loss_sum: float
    num_targets: int
    num_correct: int


class MemoryUse(NamedTuple):
    """Memory of the process, the GPU's included where the runtime computes there; bytes."""

    now_bytes: int
    peak_bytes: int
    """With a GPU the sum of two peaks, which need not have been at the same time."""


def process_memory() -> MemoryUse:
    """Return the process's resident memory."""
    now = int(rss().value or 0)
    # The kernel's two counters are brought up to date at different times.
    return MemoryUse(now, max(now, int(peak_rss().value or 0)))


class Runtime(Protocol):
    """The device's blocks, its adapters and their optimizer."""

    def forward(self, micro: Micro, step: int, index: int) -> Array:
        """Run the device's blocks for training; returns h (B, T, D), float32, and keeps a graph.

        Several may be open at the same time; `backward` takes the oldest. With ranks of 0 only,
        nothing is kept.
        """
        ...

    def tail(self, top_BTD: Array, micro: Micro, num_targets: int) -> tuple[TailSums, Array]:
        """Loss of the top hidden state and dL/dtop; a trainable head gets its gradient here.

        L is the sum over the micro-batch divided by the *num_targets* of the whole step.
        """
        ...

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass of the oldest open `forward` from dL/dh."""
        ...

    def local(self, micro: Micro, num_targets: int, step: int, index: int) -> TailSums:
        """Forward and backward of the whole model; only where the device holds all of it."""
        ...

    def step(self, step: int) -> None:
        """Update the adapters with the gradients gathered since the last update.

        Raises:
            NumericError: a gradient is NaN or infinite; nothing was changed.
        """
        ...

    def measure_importance(self, form: Form, every: int) -> None:
        """Measure the importance of the plan's weights at every *every*-th step; 0 never does."""
        ...

    def take_importance(self) -> dict[str, float]:
        """Mean importance by weight of the steps measured since the last call, or this round's.

        That of the device's own mean token loss; empty where no step was due.
        """
        ...

    def forward_eval(self, micro: Micro) -> Array:
        """Run the device's blocks without a graph and without dropout."""
        ...

    def tail_eval(self, top_BTD: Array, micro: Micro) -> TailSums:
        """Loss of the top hidden state without gradients."""
        ...

    def pairs(self) -> dict[str, Pair]:
        """Copies of the adapters' own factors."""
        ...

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite the adapters' own factors; the optimizer state stays."""
        ...

    def begin_round(self) -> None:
        """Remember the factors, so that the round's progress is known at its end."""
        ...

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residuals; weights that are not named have none."""
        ...

    def merge_change(self, changes: Mapping[str, Factors]) -> None:
        """Add the round's change of dW, less our own progress, to the residuals."""
        ...

    def head(self) -> dict[str, Array]:
        """A trainable head's parameters; empty where the head is elsewhere."""
        ...

    def load_head(self, head: Mapping[str, Array]) -> None:
        """Overwrite a trainable head's parameters."""
        ...

    def most_bytes(self) -> int:
        """Upper bound for the bytes of all factors and residuals together."""
        ...

    def memory_in_use(self) -> MemoryUse:
        """Memory now, and the most since the process began."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a restart needs: factors, residuals, head, optimizer moments."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        ...

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's part of `state`."""
        ...

    def load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the optimizer moments of `state` or `moments`, wherever they still fit."""
        ...
