"""What one side of the cut trains, whatever computes it; a checkpoint holds all of it.

`TrainingState` is adapters, optimizer, trainable head and importance meter together. Arrays cross
its border as numpy, so that a checkpoint does not tell which backend has written it. Knows no
network and no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors, condense, zero_like
from edge_sdk.lora.importance import ImportanceAccumulator
from edge_sdk.lora.numpy_adapters import NumpyAdapters
from edge_sdk.lora.optimizer_state import fitted
from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer


class Adapted(Protocol):
    """The adapters of some weights: trained factors, and frozen residuals beside them."""

    ranks: dict[str, int]
    residual: dict[str, Factors]

    def scale(self, name: str, rank: int | None = None) -> float:
        """Return the factor in front of the B A of weight *name*, if it had *rank*."""

    def pairs(self) -> dict[str, Pair]:
        """Return copies of the trained factors."""

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite trained factors; the optimizer keeps its hold on them."""

    def products(self) -> dict[str, Factors]:
        """Return what the trained factors add to their weights, scale inside."""

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the residual of the named weights; absent names keep theirs."""

    def zero_residual(self) -> dict[str, Factors]:
        """Return a residual of rank 0 for every weight that has one now."""


class Moments(Protocol):
    """An optimizer as far as its memory of past steps goes."""

    def forget_gradients(self) -> None:
        """Drop what backward passes have left."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the moments, as `<parameter>.<moment>`."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take moments over wherever name and shape still fit; the rest start fresh."""


class Pending(Protocol):
    """What forward passes have left for backward passes to come."""

    def clear(self) -> None:
        """Drop all of it."""


class TrainingState(ABC):
    """Adapters, optimizer, trainable head and importance meter of one side of the cut."""

    def __init__(
        self,
        adapters: Adapted,
        optimizer: Moments,
        meter: ImportanceAccumulator,
        pending: Pending,
    ) -> None:
        """Hold what is trained together.

        Args:
            adapters: Trained factors and frozen residuals.
            optimizer: Updates the factors and the trainable head.
            meter: Measures the importance of the weights.
            pending: Cleared when a step is given up.
        """
        self.adapters, self.optimizer, self.meter = adapters, optimizer, meter
        self._pending = pending
        self._before: dict[str, Factors] = {}
        """What the factors added to their weights when the round began."""

    @abstractmethod
    def head(self) -> dict[str, Array]:
        """Return a trainable head's parameters; empty where the head is elsewhere."""

    @abstractmethod
    def load_head(self, head: Mapping[str, Array]) -> None:
        """Overwrite a trainable head's parameters."""

    def begin_round(self) -> None:
        """Remember the factors of the round's start; a step that was given up leaves nothing."""
        self._before = self.adapters.products()
        self.meter.forget()
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what the forward and backward passes of an open step have left."""
        self.meter.drop_step()
        self.optimizer.forget_gradients()
        self._pending.clear()

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residuals; weights that are not named have none."""
        self.adapters.set_residual({**self.adapters.zero_residual(), **residual})

    def merge_change(self, changes: Mapping[str, Factors]) -> None:
        """Add the round's change of dW, less our own progress, to the residuals."""
        merge_change(self.adapters, changes, self._before)

    # ---- checkpoints ----

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs."""
        pairs = self.adapters.pairs().items()
        return {
            **{f"own:{n}.{f}": v for n, p in pairs for f, v in zip("AB", p, strict=True)},
            **_flat("residual:", self.adapters.residual),
            **{f"head:{name}": value for name, value in self.head().items()},
            **_flat("before:", self._before),
            **{f"importance:{name}": value for name, value in self.meter.state().items()},
            **self.moments(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to where `checkpoint` returned *state*."""
        own = under("own:", state)
        names = [n for n in self.adapters.ranks if f"{n}.A" in own]
        self.adapters.load_pairs({n: Pair(own[f"{n}.A"], own[f"{n}.B"]) for n in names})
        self.set_residual(_factors(under("residual:", state)))
        self.load_head(under("head:", state))
        self._before = _factors(under("before:", state))
        self.load_moments(state)
        self.meter.load_state(under("importance:", state))
        self.forget_step()

    def moments(self) -> dict[str, np.ndarray]:
        """Return the optimizer's part of `checkpoint`."""
        return {f"optimizer:{name}": value for name, value in self.optimizer.state().items()}

    def load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `checkpoint` or `moments` returned, wherever it still fits."""
        moments = under("optimizer:", state)
        self.optimizer.load_state(fitted(moments, self.adapters.ranks, self.adapters.scale))


class NumpyTrainingState(TrainingState):
    """A training state that lies in numpy arrays."""

    def __init__(
        self,
        adapters: NumpyAdapters,
        optimizer: NumpyOptimizer,
        weights: Mapping[str, int],
        head: Mapping[str, Array],
        pending: Pending,
    ) -> None:
        """Hold what is trained together.

        Args:
            adapters: Trained factors and frozen residuals.
            optimizer: Updates the factors and *head*.
            weights: Names of the weights whose importance may be measured.
            head: Parameters of a trainable head, changed in place.
            pending: Cleared when a step is given up.
        """
        super().__init__(adapters, optimizer, ImportanceAccumulator(weights), pending)
        self._head = head

    def head(self) -> dict[str, Array]:
        """Return copies of the trainable head's parameters; see `TrainingState`."""
        return {name: array.copy() for name, array in self._head.items()}

    def load_head(self, head: Mapping[str, Array]) -> None:
        """Overwrite the trainable head; see `TrainingState`."""
        for name, array in head.items():
            self._head[name][...] = array


def merge_change(
    adapters: Adapted, changes: Mapping[str, Factors], before: Mapping[str, Factors]
) -> None:
    """Set Res <- Res + change + s B A - s B' A' for the weights in *changes*.

    B A are the factors at the start of the round that ended, B' A' those that are held now; see
    docs/method.md, Aggregation.
    """
    now = adapters.products()
    merged = {}
    for name, change in changes.items():
        terms = [change]
        if name in now:
            terms += [now[name].scaled(-1.0), before[name]]
        kept = adapters.residual.get(name) or zero_like(change)
        merged[name] = condense(kept, terms, cancels=True)
    adapters.set_residual(merged)


def _flat(prefix: str, factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    named = factors.items()
    return {f"{prefix}{n}.{f}": v for n, uv in named for f, v in zip("UV", uv, strict=True)}


def _factors(flat: Mapping[str, np.ndarray]) -> dict[str, Factors]:
    names = [key.removesuffix(".V") for key in flat if key.endswith(".V")]
    return {n: Factors(flat[f"{n}.U"], flat[f"{n}.V"]) for n in names}


def under(prefix: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the entries whose names begin with *prefix*, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
