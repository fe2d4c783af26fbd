"""The `Runtime` of a device that has torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from edge_sdk.errors import NumericError
from edge_sdk.lora.adapter_state import (
    adapter_state,
    before_state,
    load_adapter_state,
    load_before_state,
    merge_change,
    under,
)
from edge_sdk.lora.adapters import Adapters, Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.importance import Form, ImportanceMeter
from edge_sdk.lora.optimizer_state import fitted
from edge_sdk.lora.rank_pruning import add_penalty
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import Layout, Task
from edge_sdk.model.loss import LossSums, loss_sums
from edge_sdk.model.partition import Slice, head_names, named_parameters
from edge_sdk.model.precision import Base, Compute, autocast, resolve_compute
from edge_sdk.model.quantized import resolve_base
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import MemoryUse, Micro, TailSums, process_memory
from edge_sdk.runtime.training import Optimizer, TrainingConfig, seed_step


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
        self._compute = resolve_compute(compute, self._device)
        dtype, quantized = resolve_base(base, self._compute)
        self._slice = Slice(config, task, layout, dtype, self._device, quantized)
        for name, tensors in parts.items():
            self._slice.add(name, tensors)
        self._plan = plan
        self._training = training
        self.adapters = Adapters(self._slice, plan.ranks, plan.alphas, lora)
        head = head_names(self._slice) if plan.tail else ()
        self._head = named_parameters(self._slice, head)
        for parameter in self._head.values():
            parameter.requires_grad_(True)
        trained = {**self.adapters.parameters(), **self._head}
        self._optimizer = Optimizer(trained, training, total_steps, self._compute)
        self._meter = ImportanceMeter(self._slice.model, plan.ranks)
        self._recompute = recompute
        self._open: deque[torch.Tensor | tuple[Micro, int, int]] = deque()
        """Hidden states whose gradient is awaited, the oldest first; or, where the backward pass
        is to compute them again, what `forward` was given."""
        self._before: dict[str, Factors] = {}

    # ---- training ----

    def forward(self, micro: Micro, step: int, index: int) -> Array:
        """Run the device's blocks; see `Runtime`."""
        keeps_graph = not (self._recompute or self._plan.is_forward_only)
        with torch.set_grad_enabled(keeps_graph):
            hidden = self._run_blocks(micro, step, index)
        if not self._plan.is_forward_only:
            self._open.append(hidden if keeps_graph else (micro, step, index))
        return to_numpy(hidden)

    def _run_blocks(self, micro: Micro, step: int, index: int) -> torch.Tensor:
        """Run the device's blocks; with the same arguments, to the same bits."""
        self._slice.model.train()
        seed_step(self._training.seed, self._device, "device", step, index)
        ids_BT, lengths_B, _ = self._tensors(micro)
        # A pass without a graph has nothing to measure.
        watched = self._meter.watching(step) if torch.is_grad_enabled() else nullcontext()
        with autocast(self._compute, self._device), watched:
            return self._slice.front(ids_BT, lengths_B, self._plan.split)

    def tail(self, top_BTD: Array, micro: Micro, num_targets: int) -> tuple[TailSums, Array]:
        """Loss and dL/dtop; see `Runtime`."""
        self._slice.model.train()
        top = torch.from_numpy(top_BTD).to(self._device).requires_grad_(True)
        sums = self._sums(top, micro)
        scale = self._optimizer.loss_scale
        torch.autograd.backward(sums.loss_B.sum() * (scale / num_targets))
        assert top.grad is not None
        return totals(sums), to_numpy(top.grad / scale)

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass from dL/dh; see `Runtime`."""
        if self._plan.is_forward_only:
            return
        assert self._open, "backward without forward"
        oldest = self._open.popleft()
        hidden = oldest if isinstance(oldest, torch.Tensor) else self._run_blocks(*oldest)
        del oldest
        if hidden.requires_grad:
            grad = torch.from_numpy(grad_BTD).to(self._device) * self._optimizer.loss_scale
            torch.autograd.backward(hidden, grad.to(hidden.dtype))

    def local(self, micro: Micro, num_targets: int, step: int, index: int) -> TailSums:
        """Forward and backward of the whole model; see `Runtime`."""
        self._slice.model.train()
        seed_step(self._training.seed, self._device, "device", step, index)
        ids_BT, lengths_B, labels = self._tensors(micro)
        with autocast(self._compute, self._device), self._meter.watching(step):
            sums = loss_sums(self._slice.whole(ids_BT, lengths_B), labels)
        torch.autograd.backward(sums.loss_B.sum() * (self._optimizer.loss_scale / num_targets))
        return totals(sums)

    def step(self, step: int) -> None:
        """Update the adapters; see `Runtime`."""
        if self._training.rank_penalty:
            weight = self._training.rank_penalty * self._optimizer.loss_scale
            own = self.adapters
            add_penalty(own.parameters(), own.ranks, weight, self._training.rank_kept)
        scale = self._optimizer.loss_scale
        if not self._optimizer.step(step):
            raise NumericError(f"step {step}: a gradient of the device's adapters is not finite")
        self._meter.close_step(lambda _: scale)

    # ---- importance ----

    def measure_importance(self, form: Form, every: int) -> None:
        """Measure at every *every*-th step from now on; see `Runtime`."""
        self._meter = ImportanceMeter(self._slice.model, self._plan.ranks, form, every)

    def take_importance(self) -> dict[str, float]:
        """Mean importance by weight since the last call; see `Runtime`."""
        return self._meter.take()

    # ---- evaluation ----

    def forward_eval(self, micro: Micro) -> Array:
        """Run the device's blocks without a graph; see `Runtime`."""
        self._slice.model.eval()
        ids_BT, lengths_B, _ = self._tensors(micro)
        with torch.no_grad(), autocast(self._compute, self._device):
            return to_numpy(self._slice.front(ids_BT, lengths_B, self._plan.split))

    def tail_eval(self, top_BTD: Array, micro: Micro) -> TailSums:
        """Loss without gradients; see `Runtime`."""
        self._slice.model.eval()
        with torch.no_grad():
            return totals(self._sums(torch.from_numpy(top_BTD).to(self._device), micro))

    def _sums(self, top: torch.Tensor, micro: Micro) -> LossSums:
        _, lengths_B, labels = self._tensors(micro)
        with autocast(self._compute, self._device):
            logits = self._slice.logits(top, lengths_B, self._slice.layout.num_blocks)
            return loss_sums(logits, labels)

    def _tensors(self, micro: Micro) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_BT, lengths_B, labels = (torch.from_numpy(np.ascontiguousarray(x)) for x in micro)
        device = self._device
        return ids_BT.to(device), lengths_B.to(device), labels.to(device)

    # ---- adapters ----

    def pairs(self) -> dict[str, Pair]:
        """Copies of the own factors."""
        return self.adapters.pairs()

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite the own factors."""
        self.adapters.load_pairs(pairs)

    def begin_round(self) -> None:
        """Remember the factors of the round's start; a step that was given up leaves nothing."""
        self._before = self.adapters.products()
        self._optimizer.forget_gradients()
        self._meter.forget()
        self._open.clear()

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residuals."""
        self.adapters.set_residual({**self.adapters.zero_residual(), **residual})

    def most_bytes(self) -> int:
        """Upper bound for the bytes of all factors and residuals together."""
        return self.adapters.most_bytes()

    def merge_change(self, changes: Mapping[str, Factors]) -> None:
        """Res <- Res + change + s B A - s B' A' with the factors held now; see `Runtime`."""
        merge_change(self.adapters, changes, self._before)

    def head(self) -> dict[str, Array]:
        """The trainable head."""
        return {n: to_numpy(p) for n, p in self._head.items()}

    def load_head(self, head: Mapping[str, Array]) -> None:
        """Overwrite the trainable head."""
        load_parameters(self._head, head)

    def memory_in_use(self) -> MemoryUse:
        """Memory now, and the most since the process began."""
        here = process_memory()
        if self._device.type != "cuda":
            return here
        # Also where CPU and GPU share their memory: the driver's pages are not resident ones.
        now = torch.cuda.memory_reserved(self._device)
        peak = torch.cuda.max_memory_reserved(self._device)
        return MemoryUse(here.now_bytes + now, here.peak_bytes + peak)

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a restart needs."""
        return {
            **adapter_state(self.adapters),
            **{f"head:{n}": v for n, v in self.head().items()},
            **before_state(self._before),
            **{f"importance:{n}": v for n, v in self._meter.state().items()},
            **self.moments(),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        load_adapter_state(self.adapters, state)
        self.load_head(under("head:", state))
        self._before = load_before_state(state)
        self.load_moments(state)
        self._meter.load_state(under("importance:", state))
        self._optimizer.forget_gradients()
        self._open.clear()

    def load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the optimizer moments of what `state` or `moments` returned."""
        moments = under("optimizer:", state)
        self._optimizer.load_state(fitted(moments, self.adapters.ranks, self.adapters.scale))

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's part of `state`."""
        return {f"optimizer:{n}": v for n, v in self._optimizer.state().items()}


def load_parameters(
    parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Array]
) -> None:
    """Overwrite parameters in place by name."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(torch.from_numpy(np.array(value)))


def to_numpy(tensor: torch.Tensor) -> Array:
    """A float32 array on the host, sharing memory where it can."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def totals(sums: LossSums) -> TailSums:
    """Sums over the sequences, as plain numbers."""
    return TailSums(
        float(sums.loss_B.detach().sum()), int(sums.targets_B.sum()), int(sums.correct_B.sum())
    )
