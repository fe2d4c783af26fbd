"""The `Runtime` of a device that has torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.factors import Array
from edge_sdk.lora.folding import folds, has_room
from edge_sdk.lora.importance import ImportanceMeter
from edge_sdk.lora.rank_pruning import add_penalty
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import Layout, Task
from edge_sdk.model.loss import LossSums, loss_sums, target_sums, whole_sums
from edge_sdk.model.partition import Slice, head_names, named_parameters
from edge_sdk.model.precision import Base, Compute, resolve_compute
from edge_sdk.model.quantized import resolve_base
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.half_range import Products
from edge_sdk.runtime.interface import MemoryUse, TailSums, process_memory
from edge_sdk.runtime.training import Optimizer, TrainingConfig, seed_step
from edge_sdk.runtime.training_state import Pending, TrainingState
from edge_sdk.runtime.transfers import transfers_of
from profiler.sensors.memory import memory_info


def pick_device(name: str) -> torch.device:
    """Return the torch device of *name*; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class TorchRuntime:
    """Blocks 0 .. split-1 of a model, their adapters, and the tail where the plan says so."""

    def __init__(
        self,
        config: Any,
        task: Task,
        layout: Layout,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        plan: Plan,
        lora: LoraConfig,
        training: TrainingConfig,
        total_steps: int,
        *,
        device: str = "auto",
        compute: Compute = "auto",
        base: Base = "float32",
        recompute: bool = False,
    ) -> None:
        self._device = pick_device(device)
        self._transfers = transfers_of(self._device)
        asked = resolve_compute(compute, self._device)
        dtype, quantized = resolve_base(base, asked)
        self.slice = Slice(config, task, layout, dtype, self._device, quantized)
        for name, tensors in parts.items():
            self.slice.add(name, tensors)
        self.products = Products(asked, self._device, self.slice.blocks)
        self._plan = plan
        self._training = training
        self._recompute = recompute
        self._open: deque[torch.Tensor | tuple[MicroBatch, int, int]] = deque()
        """Hidden states whose gradient is awaited, the oldest first; or, where the backward pass
        is to compute them again, what `forward` was given."""
        is_folded = self._folds(is_quantized=quantized is not None)
        adapters = Adapters(
            self.slice,
            plan.ranks,
            plan.alphas,
            lora,
            folds=is_folded,
            most_beside=plan.residual_rank,
        )
        head = self._trained_head()
        trained = {**adapters.parameters(), **head}
        optimizer = Optimizer(trained, training, total_steps, asked)
        meter = ImportanceMeter(self.slice.model, plan.ranks, folded=adapters.folded)
        self.state = TorchTrainingState(adapters, optimizer, meter, head, self._open, self.products)

    def _folds(self, *, is_quantized: bool) -> bool:
        """Return whether residuals go into the weights; see `folding.py`."""
        wanted = folds(self._plan.residual, is_quantized=is_quantized)
        if not wanted or self._plan.residual != "auto" or self._device.type != "cpu":
            return wanted
        return has_room(self.slice.block_bytes(), memory_info().total.value)

    def _trained_head(self) -> dict[str, torch.nn.Parameter]:
        """Return what is trained beside the adapters, by whole-model name."""
        names = head_names(self.slice) if self._plan.tail else ()
        return named_parameters(self.slice, names)

    # ---- training ----

    @property
    def has_local_tail(self) -> bool:
        """Whether the tail looks at single positions; see `Runtime`."""
        return self.slice.has_local_tail

    def forward(self, micro: MicroBatch, step: int, index: int) -> Array:
        """Run the device's blocks; see `Runtime`."""
        keeps_graph = not (self._recompute or self._plan.is_forward_only)
        with torch.set_grad_enabled(keeps_graph):
            hidden = self._run_blocks(micro, step, index)
        if not self._plan.is_forward_only:
            self._open.append(hidden if keeps_graph else (micro, step, index))
        return self._down(hidden)

    def _run_blocks(self, micro: MicroBatch, step: int, index: int) -> torch.Tensor:
        """Run the device's blocks; with the same arguments, to the same bits."""
        self.slice.model.train()
        ids_BT, lengths_B, _ = self._tensors(micro)

        def work() -> torch.Tensor:
            seed_step(self._training.seed, self._device, "device", step, index)
            return self.slice.front(ids_BT, lengths_B, self._plan.split)

        # A pass without a graph has nothing to measure.
        watched = self.state.meter.watching(step) if torch.is_grad_enabled() else nullcontext()
        with watched:
            return self.products.run(work, lambda hidden: hidden)

    @torch.no_grad()
    def is_random(self, micro: MicroBatch) -> bool:
        """Return whether `forward` gives another h each time; see `Runtime`."""
        first = self._run_blocks(micro, -1, 0)
        others = (self._run_blocks(micro, -1, index) for index in range(1, 4))
        return any(not torch.equal(first, other) for other in others)

    def tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, num_targets: int
    ) -> tuple[TailSums, Array]:
        """Return loss and dL/dh of the final hidden state; see `Runtime`."""
        self.slice.model.train()

        def attempt() -> tuple[LossSums, torch.Tensor]:
            final_hidden = self._up(final_hidden_BTD).requires_grad_(True)
            scale = self.state.optimizer.loss_scale
            unit = scale / num_targets
            sums = self._sums(final_hidden, micro, unit)
            torch.autograd.backward(sums.loss_B.sum() * unit)
            assert final_hidden.grad is not None
            return sums, final_hidden.grad / scale

        sums, grad_BTD = self.state.optimizer.scaled(attempt, lambda found: (found[1],))
        coming = self._transfers.download(grad_BTD)
        return totals(sums), coming.array()

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass from dL/dh; see `Runtime`."""
        if self._plan.is_forward_only:
            return
        assert self._open, "backward without forward"
        oldest = self._open.popleft()
        hidden = oldest if isinstance(oldest, torch.Tensor) else self._run_blocks(*oldest)
        del oldest
        if hidden.requires_grad:
            grad = self._up(grad_BTD) * self.state.optimizer.loss_scale
            torch.autograd.backward(hidden, grad.to(hidden.dtype))

    def local(self, micro: MicroBatch, num_targets: int, step: int, index: int) -> TailSums:
        """Run the whole model forward and backward; see `Runtime`."""
        self.slice.model.train()
        ids_BT, lengths_B, labels = self._tensors(micro)
        unit = self.state.optimizer.loss_scale / num_targets

        def work() -> LossSums:
            seed_step(self._training.seed, self._device, "device", step, index)
            return whole_sums(self.slice, ids_BT, lengths_B, labels, _same(unit, labels))

        with self.state.meter.watching(step):
            sums = self.products.run(work, lambda sums: sums.loss_B)
        torch.autograd.backward(sums.loss_B.sum() * unit)
        return totals(sums)

    def step(self, step: int) -> None:
        """Update the adapters; see `Runtime`."""
        if self._training.rank_penalty:
            weight = self._training.rank_penalty * self.state.optimizer.loss_scale
            own = self.state.adapters
            add_penalty(own.parameters(), own.ranks, weight, self._training.rank_kept)
        scale = self.state.optimizer.loss_scale
        if not self.state.optimizer.step(step):
            raise NumericError(f"step {step}: a gradient of the device's adapters is not finite")
        self.state.meter.close_step(step, lambda _: scale)

    # ---- evaluation ----

    def forward_eval(self, micro: MicroBatch) -> Array:
        """Run the device's blocks without a graph; see `Runtime`."""
        self.slice.model.eval()
        ids_BT, lengths_B, _ = self._tensors(micro)
        with torch.no_grad():
            work = partial(self.slice.front, ids_BT, lengths_B, self._plan.split)
            return self._down(self.products.run(work, lambda hidden: hidden))

    def tail_eval(self, final_hidden_BTD: Array, micro: MicroBatch) -> TailSums:
        """Return the loss without gradients; see `Runtime`."""
        self.slice.model.eval()
        with torch.no_grad():
            return totals(self._sums(self._up(final_hidden_BTD), micro))

    def _sums(self, final_hidden: torch.Tensor, micro: MicroBatch, unit: float = 1.0) -> LossSums:
        """Return the loss of a final hidden state; see `target_sums`."""
        _, lengths_B, labels = self._tensors(micro)
        pooled_B = None if micro.pooled is None else self._up(micro.pooled)
        last = self.slice.layout.num_blocks

        def work() -> LossSums:
            if self.slice.has_local_tail:
                return target_sums(self.slice, final_hidden, labels, _same(unit, labels))
            logits = self.slice.logits(final_hidden, lengths_B, last, pooled_B)
            return loss_sums(logits, labels)

        return self.products.run(work, lambda sums: sums.loss_B)

    def _tensors(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_BT, lengths_B, labels = (self._up(np.ascontiguousarray(x)) for x in micro[:3])
        return ids_BT, lengths_B, labels

    def _up(self, array: np.ndarray) -> torch.Tensor:
        return self._transfers.upload(array).tensor()

    def _down(self, tensor: torch.Tensor) -> Array:
        return self._transfers.download(tensor).array()

    # ---- memory ----

    def most_bytes(self) -> int:
        """Return an upper bound for the bytes of all factors and residuals; see `Runtime`."""
        return self.state.adapters.most_bytes()

    def memory_in_use(self) -> MemoryUse:
        """Return memory now, and the most since the process began; see `Runtime`."""
        here = process_memory()
        if self._device.type != "cuda":
            return here
        # Also where CPU and GPU share their memory: the driver's pages are not resident ones.
        now = torch.cuda.memory_reserved(self._device)
        peak = torch.cuda.max_memory_reserved(self._device)
        return MemoryUse(here.now_bytes + now, here.peak_bytes + peak)


class TorchTrainingState(TrainingState):
    """A training state of torch parameters, on either side of the cut."""

    adapters: Adapters
    optimizer: Optimizer
    meter: ImportanceMeter

    def __init__(
        self,
        adapters: Adapters,
        optimizer: Optimizer,
        meter: ImportanceMeter,
        head: Mapping[str, torch.nn.Parameter],
        pending: Pending,
        products: Products,
    ) -> None:
        """Hold what is trained together; *head* is trained from now on. See `TrainingState`."""
        super().__init__(adapters, optimizer, meter, pending)
        self._head, self._products = head, products
        for parameter in head.values():
            parameter.requires_grad_(True)

    def head(self) -> dict[str, Array]:
        """Return the trainable head's parameters; see `TrainingState`."""
        return {name: to_numpy(parameter) for name, parameter in self._head.items()}

    def load_head(self, head: Mapping[str, Array]) -> None:
        """Overwrite the trainable head; see `TrainingState`."""
        load_parameters(self._head, head)

    def moments(self) -> dict[str, np.ndarray]:
        """Return the optimizer's part of `checkpoint`, and whether float16 had no room."""
        return {**super().moments(), **self._products.state()}

    def load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `moments` returned; see `TrainingState`."""
        super().load_moments(state)
        self._products.load_state(state)


def _same(unit: float, labels: torch.Tensor) -> torch.Tensor:
    """Return *unit* for each row of *labels*."""
    return torch.full((len(labels),), unit, device=labels.device)


def load_parameters(
    parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Array]
) -> None:
    """Overwrite parameters in place by name."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(torch.from_numpy(np.array(value)))


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a float32 array on the host, which shares memory where it can."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def totals(sums: LossSums) -> TailSums:
    """Return the sums over the sequences, as plain numbers."""
    return each_total([sums])[0]


def each_total(sums: Sequence[LossSums]) -> list[TailSums]:
    """Return the sums over the sequences of each, as plain numbers; waits for the device once."""
    losses = torch.stack([its.loss_B.detach().sum() for its in sums])
    counts = [count.sum() for its in sums for count in (its.targets_B, its.correct_B)]
    numbers = torch.cat([losses.double(), torch.stack(counts).double()]).tolist()
    targets, corrects = numbers[len(sums) :: 2], numbers[len(sums) + 1 :: 2]
    found = zip(numbers, targets, corrects, strict=False)
    return [TailSums(loss, int(target), int(correct)) for loss, target, correct in found]
