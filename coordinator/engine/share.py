"""What a stretch of the coordinator's blocks holds and trains, from one round to the next.

It runs no wave; that is in `stage.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coordinator.engine.interface import NOTHING, Carried, Learned
from edge_sdk.lora.adapters import Adapters, Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.folding import folds
from edge_sdk.lora.importance import ImportanceMeter
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import Layout
from edge_sdk.model.partition import Slice, head_names, named_parameters
from edge_sdk.model.precision import Compute, resolve_compute
from edge_sdk.protocol.plan import Residual
from edge_sdk.runtime.half_range import Products
from edge_sdk.runtime.torch_runtime import TorchTrainingState, load_parameters
from edge_sdk.runtime.training import Optimizer, TrainingConfig
from edge_sdk.runtime.training_state import Pending
from edge_sdk.runtime.transfers import transfers_of


class Share:
    """Blocks with adapters and optimizer, and a classifier's head where that is trained here."""

    def __init__(
        self,
        slice_: Slice,
        first: int,
        ranks: Mapping[str, int],
        lora: LoraConfig,
        training: TrainingConfig,
        total_steps: int,
        *,
        trains_head: bool,
        stop: int | None = None,
        compute: Compute = "auto",
        residual: Residual = "auto",
        pending: Pending | None = None,
    ) -> None:
        """Train blocks of *slice_*, which may hold others to evaluate.

        Args:
            slice_: The model, as far as it is here.
            first: First block that is trained.
            ranks: Rank of each adapter, by weight.
            lora: LoRA configuration of the run.
            training: Optimizer and schedule.
            total_steps: Steps of the run.
            trains_head: Whether a classifier's head is trained here.
            stop: Block after the last one; None: the model's end.
            compute: Dtype of matrix products.
            residual: How residuals are computed with.
            pending: Cleared when a step is given up.
        """
        self.slice = slice_
        self.first = first
        self._layout: Layout = slice_.layout
        self.stop = self._layout.num_blocks if stop is None else stop
        self._device = slice_.device
        self._transfers = transfers_of(slice_.device)
        self._training = training
        asked = resolve_compute(compute, slice_.device)
        self._products = Products(asked, slice_.device, slice_.blocks)
        is_folded = folds(residual, is_quantized=slice_.is_quantized)
        adapters = Adapters(slice_, ranks, {}, lora, folds=is_folded)
        head = named_parameters(slice_, head_names(slice_) if trains_head else ())
        parameters = {**adapters.parameters(), **head}
        optimizer = Optimizer(parameters, training, total_steps, asked)
        meter = ImportanceMeter(slice_.model, ranks, folded=adapters.folded)
        self.trained = TorchTrainingState(
            adapters, optimizer, meter, head, [] if pending is None else pending, self._products
        )

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each of our own adapters, by weight."""
        return self.trained.adapters.ranks

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the head's parameters; see `Engine`."""
        named = named_parameters(self.slice, head_names(self.slice))
        return {name: tuple(parameter.shape) for name, parameter in named.items()}

    def learned(self) -> Learned:
        """Return what this round has made of our own weights; see `Engine`."""
        return Learned(
            self.trained.adapters.pairs(), self.trained.head(), self.trained.meter.take()
        )

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> None:
        """Hold what a new engine of this run has to; see `Engine`."""
        own = self.trained
        own.adapters.load_pairs(pairs)
        own.set_residual({n: f for n, f in residuals.items() if self.is_present(n)})
        if carried is not None:
            own.load_moments(carried.moments)
            own.load_head(carried.head)
        own.begin_round()

    def carried(self) -> Carried:
        """Return what the next engine goes on with; see `Engine`."""
        return Carried(self.trained.head(), self.trained.moments())

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        *,
        restarts: bool = False,
    ) -> None:
        """Take over what an aggregation hands out, as a device does; see `Engine`."""
        own = self.trained
        own.adapters.load_pairs(replaced)
        own.merge_change({n: c for n, c in changes.items() if self.is_present(n)})
        if restarts:
            own.load_moments({})
        if "tail" in self.slice.present:
            names = head_names(self.slice)
            load_parameters(named_parameters(self.slice, names), {n: head[n] for n in head})
        own.begin_round()

    def is_present(self, name: str) -> bool:
        """Return whether the block of weight *name* is here."""
        return f"block.{self.block_of(name)}" in self.slice.present

    @property
    def has_left(self) -> bool:
        """Whether numbers did not fit into float16, which products have left since."""
        return self._products.has_left

    def leave_float16(self) -> None:
        """Compute in a wider range from now on, if it was float16."""
        self._products.leave()

    def close(self) -> None:
        """Nothing is held that the last reference does not free; see `Engine`."""

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs; see `Engine`."""
        return {"first": np.array(self.first), **self.trained.checkpoint()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.trained.restore(state)

    def block_of(self, name: str) -> int | None:
        """Return the block that a weight belongs to; None outside the blocks."""
        return self._layout.block_of(name)
