"""What a device can do with its slice, whatever computes it: the `Runtime` interface.

Knows no network. `torch_runtime.py` and `onnx_runtime.py` implement it; arrays cross this border as
numpy, so that a runtime without torch can stand beside one with it.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Array
from edge_sdk.runtime.training_state import TrainingState
from profiler.sensors.memory import peak_rss, rss


class TailSums(NamedTuple):
    """What the tail found for one micro-batch."""

    loss_sum: float
    num_targets: int
    num_correct: int


def add_up(sums: Sequence[TailSums]) -> TailSums:
    """Return what the tail found for several micro-batches, added in their order."""
    return TailSums(
        sum(s.loss_sum for s in sums),
        sum(s.num_targets for s in sums),
        sum(s.num_correct for s in sums),
    )


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
    """The device's blocks, and what is trained of them."""

    @property
    def state(self) -> TrainingState:
        """Adapters, optimizer, trainable head and importance meter."""

    @property
    def has_local_tail(self) -> bool:
        """Whether the tail needs the final hidden state only where a target is predicted."""

    def forward(self, micro: MicroBatch, step: int, index: int) -> Array:
        """Run the device's blocks for training; return h (B, T, D), float32, and keep a graph.

        Several may be open at the same time; `backward` takes the oldest. With ranks of 0 only,
        nothing is kept.
        """

    def is_random(self, micro: MicroBatch) -> bool:
        """Return whether `forward` gives another h each time, as it does with dropout."""

    def tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, num_targets: int
    ) -> tuple[TailSums, Array]:
        """Return loss and dL/dh of the final hidden state; a trainable head gets its gradient here.

        L is the sum over the micro-batch divided by the *num_targets* of the whole step. A local
        tail reads nothing else than the positions that predict a target; elsewhere dL/dh is 0.
        """

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass of the oldest open `forward` from dL/dh."""

    def local(self, micro: MicroBatch, num_targets: int, step: int, index: int) -> TailSums:
        """Run the whole model forward and backward; only where the device holds all of it."""

    def step(self, step: int) -> None:
        """Update the adapters with the gradients gathered since the last update.

        Raises:
            NumericError: a gradient is NaN or infinite; nothing was changed.
        """

    def forward_eval(self, micro: MicroBatch) -> Array:
        """Run the device's blocks without a graph and without dropout."""

    def tail_eval(self, final_hidden_BTD: Array, micro: MicroBatch) -> TailSums:
        """Return the loss of the final hidden state, without gradients."""

    def most_bytes(self) -> int:
        """Return an upper bound for the bytes of all factors and residuals together."""

    def memory_in_use(self) -> MemoryUse:
        """Return memory now, and the most since the process began."""
