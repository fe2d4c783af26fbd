"""The coordinator's share of the model: many devices, cut anywhere, one forward and one backward.

`LocalEngine` runs in this process; what it is asked for stands in `interface.py`. It knows no
network and no rounds.

A wave's rows enter at their own block: devices sorted by split, each joins the batch where its own
blocks end. The loss that is differentiated is sum_i n_i L_i, with L_i device i's own mean token
loss and n_i its samples. Device i gets its part divided by n_i, so that its gradient is that of L_i
alone; the adapter of block l gets the sum divided by the samples served in that block: the mean
over these devices, weighted by p_i = n_i / sum_j n_j. See docs/method.md, Mixed split points.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from coordinator.engine.blocks import load_slice
from coordinator.engine.interface import (
    NOTHING,
    Answer,
    Carried,
    DeviceFault,
    EngineSpec,
    Job,
    Learned,
)
from coordinator.engine.whole import Manner, continue_text, evaluate_whole
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.adapters import Adapters, Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.folding import folds
from edge_sdk.lora.importance import ImportanceMeter
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import Layout
from edge_sdk.model.loss import IGNORED, LossSums, loss_sums, target_sums
from edge_sdk.model.partition import Slice, head_names, named_parameters
from edge_sdk.model.precision import Compute, autocast, resolve_compute
from edge_sdk.protocol.plan import Place, Residual
from edge_sdk.runtime.half_range import Products
from edge_sdk.runtime.interface import TailSums
from edge_sdk.runtime.torch_runtime import (
    TorchTrainingState,
    each_total,
    load_parameters,
    totals,
)
from edge_sdk.runtime.training import Optimizer, TrainingConfig, seed_step
from edge_sdk.runtime.transfers import Arrival, transfers_of


@dataclass(eq=False)
class _Wave:
    """A wave between its forward and its backward."""

    jobs: list[Job]
    leaves: list[torch.Tensor]
    final_hidden: torch.Tensor
    """Hidden states after the last block; logits where `has_logits`."""
    step: int
    number: int
    has_logits: bool = False
    """Whether the tail has run on all positions, with the blocks."""
    is_spent: bool = False
    """Whether its graph is used up: a wave can be gone back through once."""

    def gradients(self) -> list[torch.Tensor]:
        """Return what goes back to the devices, the loss scale still inside."""
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]


@dataclass
class _OpenStep:
    """What is there between the first forward pass of a step and its update."""

    waves: list[_Wave] = field(default_factory=list)
    """Waves that await their gradients, the oldest first."""
    served: dict[str, Job] = field(default_factory=dict)
    """Who was served in the step, by device; by micro-batch where these count for themselves."""

    def serve(self, job: Job) -> None:
        """Note that the step has gradients of a micro-batch."""
        if job.samples is None:
            self.served[job.device] = job
        elif job.samples:
            self.served[f"{job.device} {len(self.served)}"] = job

    def clear(self) -> None:
        """Drop all of it."""
        self.waves, self.served = [], {}

    def waves_of(self, places: Container[Place]) -> list[_Wave]:
        """Return the waves that any of *places* was in."""
        return [w for w in self.waves if any(job.place in places for job in w.jobs)]


class LocalEngine:
    """Blocks first .. L-1 with adapters and optimizer, in this process."""

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
        compute: Compute = "auto",
        residual: Residual = "auto",
    ) -> None:
        self.slice = slice_
        self.first = first
        self._layout: Layout = slice_.layout
        self._device = slice_.device
        self._transfers = transfers_of(slice_.device)
        self._training = training
        asked = resolve_compute(compute, slice_.device)
        self._products = Products(asked, slice_.device, slice_.blocks)
        self.open_step = _OpenStep()
        is_folded = folds(residual, is_quantized=slice_.is_quantized)
        adapters = Adapters(slice_, ranks, {}, lora, folds=is_folded)
        head = named_parameters(slice_, head_names(slice_) if trains_head else ())
        parameters = {**adapters.parameters(), **head}
        optimizer = Optimizer(parameters, training, total_steps, asked)
        meter = ImportanceMeter(slice_.model, ranks, folded=adapters.folded)
        self.trained = TorchTrainingState(
            adapters, optimizer, meter, head, self.open_step, self._products
        )

    # ---- training ----

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave; see `Engine`.

        Raises:
            DeviceFault: a device's loss is not finite; nothing was accumulated.
        """
        if not jobs:  # the devices of this micro-batch have left
            return []

        def attempt() -> tuple[_Wave, list[TailSums]]:
            own = self._forward(jobs, step, wave, to_logits=not self.slice.has_local_tail)
            sums = self._losses(own)
            found = each_total(sums)
            total = torch.zeros((), device=self._device)
            for job, its, told in zip(own.jobs, sums, found, strict=True):
                loss = told.loss_sum
                if not isfinite(loss):
                    raise DeviceFault(job.device, f"the loss of device {job.device!r} is {loss}")
                total = total + (job.weight / job.num_targets) * its.loss_B.sum()
            torch.autograd.backward(total * self.trained.optimizer.loss_scale)
            return own, found

        with self._moved_by(jobs):
            own, sums = self.trained.optimizer.scaled(attempt, lambda found: found[0].gradients())
        return self._answers(own, sums, {job.place for job in jobs})

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Run forward for a wave whose labels stay on the devices; see `Engine`."""
        if not jobs:
            return {}
        with self._moved_by(jobs):
            own = self._forward(jobs, step, wave, to_logits=False)
        if keeps:
            self.open_step.waves.append(own)
        return self._final_hidden(own)

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through what `forward` has left of these micro-batches; see `Engine`."""
        waves = self.open_step.waves_of(grads)
        places = {job.place for wave in waves for job in wave.jobs}
        assert places >= grads.keys(), "backward without forward"
        answers = [answer for wave in waves for answer in self._go_back(wave, grads)]
        self.open_step.waves = [wave for wave in self.open_step.waves if wave not in waves]
        return answers

    def _go_back(self, wave: _Wave, grads: Mapping[Place, Array]) -> list[Answer]:
        def attempt() -> _Wave:
            own = wave
            if wave.is_spent:
                own = self._forward(wave.jobs, wave.step, wave.number, to_logits=False)
            wave.is_spent = True
            self._pull(own, grads)
            return own

        with self._moved_by(wave.jobs):
            done = self.trained.optimizer.scaled(attempt, _Wave.gradients)
        return self._answers(done, [None] * len(done.jobs), grads)

    @contextmanager
    def _moved_by(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Leave the trained parameters out of a graph that is to move none of them."""
        if not jobs or any(job.samples != 0.0 for job in jobs):
            yield
            return
        parameters = list(self.trained.optimizer.parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _pull(self, wave: _Wave, grads: Mapping[Place, Array]) -> None:
        """Go back through a wave from what the devices have sent."""
        grad_BTD = torch.zeros_like(wave.final_hidden)
        start = 0
        for job in wave.jobs:
            rows, length = job.hidden_BTD.shape[:2]
            if job.place in grads:
                own = self._up(grads[job.place])
                scale = job.weight * self.trained.optimizer.loss_scale
                own_rows = grad_BTD[start : start + rows, :length]
                own_rows[self._wanted(job)] = (own * scale).to(grad_BTD.dtype)
            start += rows
        torch.autograd.backward(wave.final_hidden, grad_BTD)

    def finish_step(self, step: int) -> bool:
        """Divide each block's gradient by the samples served in it, clip, update."""
        served = list(self.open_step.served.values())
        self.open_step.clear()  # also of waves whose devices have all left
        scale = self.trained.optimizer.loss_scale
        for name, parameter in self.trained.optimizer.parameters.items():
            if parameter.grad is not None:
                parameter.grad /= self._samples(name, served)
        is_done = self.trained.optimizer.step(step)
        self.trained.meter.close_step(step, lambda name: scale * self._samples(name, served))
        return is_done

    def _samples(self, name: str, served: Iterable[Job]) -> float:
        """Count the samples whose gradients the weight *name* has seen."""
        block = self.block_of(name)
        return sum(
            job.weight if job.samples is None else job.samples
            for job in served
            if block is None or job.split <= block
        )

    def block_of(self, name: str) -> int | None:
        """Return the block that a weight belongs to; None outside the blocks."""
        prefix = f"{self._layout.blocks_path}."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).split(".", 1)[0])

    def _forward(self, jobs: Sequence[Job], step: int, number: int, *, to_logits: bool) -> _Wave:
        self.slice.model.train()
        # By name within a split: the same wave gives the same bits whoever answered first.
        ordered = sorted(jobs, key=lambda job: (job.split, job.device, job.micro))
        hidden = [self._transfers.upload(job.hidden_BTD) for job in ordered]
        leaves = [coming.raw.requires_grad_(True) for coming in hidden]

        def work() -> torch.Tensor:
            seed_step(self._training.seed, self._device, "coordinator", step, number)
            return self._run_blocks(ordered, hidden, to_logits=to_logits)

        with self.trained.meter.watching(step):
            final_hidden = self._products.run(work, lambda found: found)
        return _Wave(ordered, leaves, final_hidden, step, number, to_logits)

    def _up(self, array: np.ndarray) -> torch.Tensor:
        return self._transfers.upload(array).tensor()

    def _run_blocks(
        self, jobs: Sequence[Job], hidden: Sequence[Arrival], *, to_logits: bool
    ) -> torch.Tensor:
        """Run all blocks, letting each job's rows join at its own, when they have arrived."""
        last = self._layout.num_blocks
        longest = max(coming.raw.shape[1] for coming in hidden)
        ids_BT = self._ids(jobs, longest)
        all_B = self._up(np.concatenate([job.lengths_B for job in jobs], dtype=np.int32))
        batch: torch.Tensor | None = None
        stops = [*(job.split for job in jobs[1:]), last]
        for job, own, stop in zip(jobs, hidden, stops, strict=True):
            padded = F.pad(self._entering(own.tensor()), (0, 0, 0, longest - own.raw.shape[1]))
            batch = padded if batch is None else torch.cat([batch, padded.to(batch.dtype)])
            lengths_B = all_B[: len(batch)]
            if stop > job.split and not (to_logits and stop == last):
                own_ids = None if ids_BT is None else ids_BT[: len(batch)]
                batch = self.slice.middle(batch, lengths_B, job.split, stop, own_ids)
        assert batch is not None, "a wave has at least one job"
        if to_logits:
            pooled_B = self._pooled(jobs)
            batch = self.slice.logits(batch, all_B, jobs[-1].split, pooled_B, ids_BT)
        return batch

    def _entering(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a hidden state as blocks of this base hand it on: in 16 bits where they do."""
        kind, dtype = self._device.type, self.slice.dtype
        is_own = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == dtype
        return hidden.to(dtype) if is_own else hidden

    def _ids(self, jobs: Sequence[Job], longest: int) -> torch.Tensor | None:
        """Return the token ids of a wave, padded; None where the model's blocks need none."""
        if not self._layout.needs_ids:
            return None
        ids = [job.ids_BT for job in jobs if job.ids_BT is not None]
        assert len(ids) == len(jobs), "blocks need the token ids"
        return self._up(_joined(ids, longest, self.slice.pad_id))

    def _pooled(self, jobs: Sequence[Job]) -> torch.Tensor | None:
        """Return where a classification head looks in each sequence; None: always at its end."""
        if all(job.pooled_B is None for job in jobs):
            return None
        ends = (job.lengths_B - 1 if job.pooled_B is None else job.pooled_B for job in jobs)
        return self._up(np.concatenate(list(ends), dtype=np.int32))

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return the loss of an evaluation micro-batch, or its final hidden state; see `Engine`."""
        self.slice.model.eval()
        hidden = [self._transfers.upload(job.hidden_BTD)]
        to_logits = job.labels is not None and not self.slice.has_local_tail
        run = partial(self._run_blocks, [job], hidden, to_logits=to_logits)
        with torch.no_grad():
            final_hidden = self._products.run(run, lambda found: found)
            if job.labels is None:
                return self._transfers.download(final_hidden[self._wanted(job)]).array()
            labels = self._up(job.labels.astype(np.int64))
            return totals(self._sums(final_hidden, labels, has_logits=to_logits))

    def _sums(
        self,
        final_hidden: torch.Tensor,
        labels: torch.Tensor,
        unit_B: torch.Tensor | None = None,
        *,
        has_logits: bool,
    ) -> LossSums:
        """Return the loss of what comes out of the blocks, or of the tail; see `target_sums`."""
        if has_logits:
            with autocast(self._products.dtype, self._device):
                return loss_sums(final_hidden, labels)
        tail = partial(target_sums, self.slice, final_hidden, labels, unit_B)
        return self._products.run(tail, lambda sums: sums.loss_B)

    def _losses(self, wave: _Wave) -> list[LossSums]:
        """Compute a wave's losses at once, so that nothing is sliced; return them by job."""
        given = [job.labels for job in wave.jobs if job.labels is not None]
        assert len(given) == len(wave.jobs), "labels are on the device"
        longest = max(job.hidden_BTD.shape[1] for job in wave.jobs)
        labels = self._up(_joined(given, longest, IGNORED))
        rows = [len(job.lengths_B) for job in wave.jobs]
        scale = self.trained.optimizer.loss_scale
        units = [scale * job.weight / job.num_targets for job in wave.jobs]
        unit_B = self._up(np.repeat(np.array(units, np.float32), rows))
        whole = self._sums(wave.final_hidden, labels, unit_B, has_logits=wave.has_logits)
        by_job = [torch.split(column, rows) for column in whole]
        return [LossSums(*columns) for columns in zip(*by_job, strict=True)]

    def _answers(
        self, wave: _Wave, sums: Sequence[TailSums | None], places: Container[Place]
    ) -> list[Answer]:
        scale, coming = self.trained.optimizer.loss_scale, []
        for job, leaf, found in zip(wave.jobs, wave.leaves, sums, strict=True):
            if job.place not in places:
                continue
            assert leaf.grad is not None
            grad = self._transfers.download(leaf.grad / (job.weight * scale))
            coming.append((job, grad, found))
            self.open_step.serve(job)
        return [Answer(job.device, grad.array(), found, job.micro) for job, grad, found in coming]

    def _final_hidden(self, wave: _Wave) -> dict[Place, Array]:
        coming, start = {}, 0
        for job in wave.jobs:
            rows, length = job.hidden_BTD.shape[:2]
            own = wave.final_hidden[start : start + rows, :length]
            coming[job.place] = self._transfers.download(own[self._wanted(job)])
            start += rows
        return {place: hidden.array() for place, hidden in coming.items()}

    def _wanted(self, job: Job) -> Any:
        """Return the index of what a device wants of the rows of its final hidden state."""
        if job.wanted_BT is None:
            return ...
        # Not the mask: the device would have to say how many it marks before anything goes on.
        return tuple(self._up(np.stack(job.wanted_BT.nonzero())))

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of one micro-batch through the whole model; see `Engine`."""
        return evaluate_whole(self.slice, self._products, micro)

    def continue_text(self, ids: Sequence[int], manner: Manner) -> list[int]:
        """Return the tokens that the whole model adds to a prompt; see `Engine`."""
        return continue_text(self.slice, self._products, ids, manner)

    # ---- adapters ----

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

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs; see `Engine`."""
        return {"first": np.array(self.first), **self.trained.checkpoint()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.trained.restore(state)


def make_local(spec: EngineSpec, kind: Callable[..., LocalEngine] = LocalEngine) -> LocalEngine:
    """Build an engine in this process, of class *kind*."""
    config, source = spec.config, spec.source
    engine = kind(
        load_slice(config, source, spec.parts),
        spec.first,
        spec.ranks,
        config.lora,
        config.training,
        config.total_steps,
        trains_head=config.labels == "server",
        compute=config.compute,
        residual=config.residual,
    )
    planning = config.planning
    if planning.measures_importance:
        engine.trained.meter.measure(planning.importance, planning.importance_every)
    return engine


def _joined(arrays: Sequence[np.ndarray], longest: int, filler: int) -> np.ndarray:
    """Return whole numbers of several jobs under one another, with *filler* up to *longest*."""
    if arrays[0].ndim == 1:
        return np.concatenate(arrays, dtype=np.int64)
    padded = (
        np.pad(a, ((0, 0), (0, longest - a.shape[1])), constant_values=filler) for a in arrays
    )
    return np.concatenate(list(padded), dtype=np.int64)
