"""What the coordinator asks of whatever computes its blocks: the `Engine` and its words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from coordinator.config.run import ServeConfig
from coordinator.engine.whole import IntArray, Manner
from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import EdgeError, NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums

NOTHING: Mapping[str, Factors] = MappingProxyType({})


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
    ids_BT: np.ndarray | None = None
    """Token ids, where later blocks of the model need them."""
    pooled_B: np.ndarray | None = None
    """Where a decoder's classification head looks in each sequence; None: at its last token."""
    wanted_BT: np.ndarray | None = None
    """With `labels: device`, where the device needs its final hidden state; None: everywhere."""
    micro: int = 0
    """Number of the micro-batch in the device's step."""
    samples: float | None = None
    """Samples for which it moves the coordinator's adapters, where the micro-batches of a device's
    step may go into different updates; 0: for none, it is computed for the device alone. None: the
    step is in one update as a whole."""

    @property
    def place(self) -> Place:
        """What it is known by in its step."""
        return self.device, self.micro

    @property
    def top_shape(self) -> tuple[int, ...]:
        """Shape of the final hidden state as the device gets it, and of its gradient."""
        if self.wanted_BT is None:
            return self.hidden_BTD.shape
        return int(self.wanted_BT.sum()), self.hidden_BTD.shape[-1]


@dataclass(frozen=True)
class Answer:
    """What one device gets back."""

    device: str
    grad_BTD: Array
    sums: TailSums | None
    micro: int = 0
    """Number of the micro-batch that it answers."""


class DeviceFault(NumericError):
    """A wave could not be computed because of what one device sent; the others may go on."""

    def __init__(self, device: str, text: str) -> None:
        super().__init__(text)
        self.device = device

    def __reduce__(self) -> tuple[type[DeviceFault], tuple[str, str]]:
        """Let it pass from one process to another."""
        return type(self), (self.device, str(self))


class ComputeFailed(EdgeError):
    """What one device sent led to an error that nobody foresaw."""

    def __init__(self, device: str, error: Exception) -> None:
        super().__init__(f"the part of device {device!r}: {type(error).__name__}: {error}")
        self.device, self.error = device, error


class Learned(NamedTuple):
    """What the engine's own weights have become in a round."""

    pairs: Mapping[str, Pair]
    """Its own factors by weight."""
    head: Mapping[str, Array]
    """The trained head; empty where it is trained elsewhere."""
    importance: Mapping[str, float]
    """Mean importance by weight of the round's measured steps."""


class Carried(NamedTuple):
    """What an engine leaves to the one that takes its place."""

    head: Mapping[str, Array]
    """The trained head; empty where it is trained elsewhere."""
    moments: Mapping[str, np.ndarray]
    """State of the optimizer; what no longer fits begins anew."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is to be made of."""

    config: ServeConfig
    source: ModelSource
    """Where the parts of the model are."""
    parts: tuple[str, ...]
    """Parts that it holds, some of them only to evaluate."""
    first: int
    """First block that it trains."""
    ranks: Mapping[str, int]
    """Rank of each of its own adapters, by weight."""
    stop: int | None = None
    """Block after the last one of a stage; None: it holds the model's end."""


class Engine(Protocol):
    """What the coordinator asks of whatever computes its blocks."""

    # ---- what it is ----

    @property
    def first(self) -> int:
        """First block that it trains."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each of its own adapters, by weight."""

    def head_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the head's parameters, whoever trains them."""

    # ---- waves ----

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave whose labels are here.

        Args:
            jobs: Micro-batches of any devices, several of one device as well.
            step: The step that they belong to.
            wave: Number of the wave in its step, from which random numbers are drawn.

        Raises:
            DeviceFault: a device's loss is not finite; nothing was accumulated.
        """

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Return the final hidden states of a wave whose labels stay on the devices.

        Each is of its job's `top_shape`: (B, T, D), or the wanted positions alone. Several waves of
        a step may await their gradients at the same time.

        Args:
            jobs: As in `train`.
            step: As in `train`.
            wave: As in `train`.
            keeps: Whether `backward` is to find what it needs; else nothing is kept.
        """

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through the waves that these micro-batches were in, which are then over.

        Each gradient has the shape of what `forward` has returned. A micro-batch of such a wave
        without a gradient of its device's own loss counts nothing.
        """

    def finish_step(self, step: int) -> bool:
        """Update the adapters; False when a gradient was not finite and nothing was changed."""

    # ---- evaluation ----

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return an evaluation micro-batch's loss; without labels, its final hidden state."""

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of a micro-batch through the whole model, whose blocks are all here."""

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the most likely class (B,) of each sequence, by the whole model."""

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the whole model, whose blocks are all here, adds to each prompt.

        Raises:
            ConfigError: there is no room for a token behind so many.
            ModelError: transformers cannot generate with this model.
        """

    # ---- between rounds ----

    def learned(self) -> Learned:
        """Return what this round has made of its own weights; its importance begins anew."""

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        *,
        restarts: bool = False,
    ) -> None:
        """Take over what an aggregation hands out, as a device does.

        Args:
            changes: What is added to the residuals, by weight; also of blocks held to evaluate.
            replaced: Its new own factors, where the rule replaces them.
            head: The trained head.
            restarts: Whether the optimizer begins anew.
        """

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> None:
        """Hold what a new engine of this run has to.

        Args:
            pairs: Its own factors, by weight.
            residuals: What else the run has added to a weight; those of absent blocks are ignored.
            carried: What the engine before it had, of other blocks or ranks; None for the first.
        """

    def carried(self) -> Carried:
        """Return what the next engine, of other blocks or ranks, goes on with."""

    # ---- checkpoint ----

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs.

        Among it are `first` and its own factors, as `own:<weight>.A` and `own:<weight>.B`: they say
        which engine can take it over.
        """

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""

    def close(self) -> None:
        """Free what it holds beside its memory: nothing is asked of it any more."""


EngineMaker = Callable[[EngineSpec], Engine]
