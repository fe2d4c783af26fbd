"""A stage of the coordinator's share: how waves run through a stretch of blocks.

One stage holds the whole share (`local.py`), or several in a row do, each in a process of its own.
It knows no other stage, no network and no rounds.

A wave's rows enter at their own block: devices sorted by split, each joins the batch where its own
blocks end; rows that have entered an earlier stage come from there. The loss that is differentiated
is sum_i n_i L_i, with L_i device i's own mean token loss and n_i its samples. Device i gets its
part divided by n_i, so that its gradient is that of L_i alone; the adapter of block l gets the sum
divided by the samples served in that block: the mean over these devices, weighted by
p_i = n_i / sum_j n_j. See docs/method.md, Mixed split points.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from coordinator.engine.blocks import load_slice
from coordinator.engine.interface import DeviceFault, EngineSpec, Job
from coordinator.engine.passage import Entered, Passage, StepPassages, in_order
from coordinator.engine.share import Share
from coordinator.engine.whole import IntArray, Manner, continue_texts, evaluate_whole, predict_whole
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Array
from edge_sdk.model.loss import IGNORED, LossSums, loss_sums, target_sums
from edge_sdk.model.precision import autocast
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums
from edge_sdk.runtime.torch_runtime import each_total, totals
from edge_sdk.runtime.training import seed_step
from edge_sdk.runtime.transfers import Arrival

Kind = TypeVar("Kind", bound="Stage")


class Stage(Share):
    """Runs waves through blocks first .. stop-1; the last stage has the tail as well."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Take what a `Share` does, but for `pending`."""
        self.open_step = StepPassages()
        super().__init__(*args, pending=self.open_step, **settings)

    # ---- a wave goes up ----

    def run(
        self,
        jobs: Sequence[Job],
        step: int,
        number: int,
        *,
        to_logits: bool = False,
        entered: Entered | None = None,
        part: int = 0,
    ) -> Passage:
        """Run a wave forward, or a part of one.

        Args:
            jobs: Those with rows here, in any order. Of those that have entered before, the
                hidden state is not looked at, only its shape (B, T).
            step: The step that they belong to.
            number: Number of the wave in its step.
            to_logits: Whether the tail runs on all positions, with the blocks.
            entered: Rows of the jobs that have entered before, in their order.
            part: Number of the part, where a wave is cut into several.
        """
        self.slice.model.train()
        ordered = in_order(jobs)
        entering = [job for job in ordered if entered is None or job.split >= self.first]
        hidden = [self._transfers.upload(job.hidden_BTD) for job in entering]
        leaves = [coming.raw.requires_grad_(True) for coming in hidden]
        below = None
        if entered is not None:
            below = self._up(entered.hidden_BTD).to(entered.dtype).requires_grad_(True)

        def work() -> torch.Tensor:
            self._seed(entered, step, number, part)
            return self._run_blocks(ordered, hidden, below, to_logits=to_logits)

        with self.trained.meter.watching(step):
            top = self._products.run(work, lambda found: found)
        return Passage(ordered, leaves, top, step, number, below, to_logits)

    def _seed(self, entered: Entered | None, step: int, number: int, part: int) -> None:
        """Let random numbers be those of a wave that one stage runs as a whole, where it is one."""
        if entered is None:
            where = (step, number, part) if part else (step, number)
            seed_step(self._training.seed, self._device, "coordinator", *where)
        elif self._device.type == "cuda":
            torch.cuda.set_rng_state(entered.draws, self._device)
        else:
            torch.set_rng_state(entered.draws)

    def hand_on(self, passage: Passage) -> Entered:
        """Return what the next stage gets, right after `run`."""
        is_cuda = self._device.type == "cuda"
        draws = torch.cuda.get_rng_state(self._device) if is_cuda else torch.get_rng_state()
        return Entered(self._transfers.download(passage.top).array(), passage.top.dtype, draws)

    def _up(self, array: np.ndarray) -> torch.Tensor:
        return self._transfers.upload(array).tensor()

    def _run_blocks(
        self,
        jobs: Sequence[Job],
        hidden: Sequence[Arrival],
        below: torch.Tensor | None = None,
        *,
        to_logits: bool,
    ) -> torch.Tensor:
        """Run all blocks, letting each job's rows join at its own, when they have arrived."""
        last = self.stop
        longest = max(job.hidden_BTD.shape[1] for job in jobs)
        ids_BT = self._ids(jobs, longest)
        all_B = self._up(np.concatenate([job.lengths_B for job in jobs], dtype=np.int32))
        entering = jobs[len(jobs) - len(hidden) :]
        joins = [(job.split, own) for job, own in zip(entering, hidden, strict=True)]
        if below is not None:
            joins = [(self.first, Arrival(below)), *joins]
        batch: torch.Tensor | None = None
        stops = [*(start for start, _ in joins[1:]), last]
        for (start, own), stop in zip(joins, stops, strict=True):
            padded = F.pad(self._entering(own.tensor()), (0, 0, 0, longest - own.raw.shape[1]))
            batch = padded if batch is None else torch.cat([batch, padded.to(batch.dtype)])
            lengths_B = all_B[: len(batch)]
            if stop > start and not (to_logits and stop == last):
                own_ids = None if ids_BT is None else ids_BT[: len(batch)]
                batch = self.slice.middle(batch, lengths_B, start, stop, own_ids)
        assert batch is not None, "a wave has at least one job"
        if to_logits:
            pooled_B = self._pooled(jobs)
            batch = self.slice.logits(batch, all_B, joins[-1][0], pooled_B, ids_BT)
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

    # ---- and down ----

    def learn(self, passage: Passage) -> list[TailSums]:
        """Go back from the loss of a passage whose labels are here; return each job's loss.

        Raises:
            DeviceFault: a device's loss is not finite; nothing was accumulated.
        """
        sums = self._losses(passage)
        found = each_total(sums)
        total = torch.zeros((), device=self._device)
        for job, its, told in zip(passage.jobs, sums, found, strict=True):
            loss = told.loss_sum
            if not isfinite(loss):
                raise DeviceFault(job.device, f"the loss of device {job.device!r} is {loss}")
            total = total + (job.weight / job.num_targets) * its.loss_B.sum()
        torch.autograd.backward(total * self.trained.optimizer.loss_scale)
        return found

    def pull(self, passage: Passage, grads: Mapping[Place, Array]) -> None:
        """Go back through a passage from what the devices have sent."""
        passage.is_spent = True
        grad_BTD = torch.zeros_like(passage.top)
        start = 0
        for job in passage.jobs:
            rows, length = job.hidden_BTD.shape[:2]
            if job.place in grads:
                own = self._up(grads[job.place])
                scale = job.weight * self.trained.optimizer.loss_scale
                own_rows = grad_BTD[start : start + rows, :length]
                own_rows[self._wanted(job)] = (own * scale).to(grad_BTD.dtype)
            start += rows
        torch.autograd.backward(passage.top, grad_BTD)

    def fall(self, passage: Passage, grad_BTD: Array) -> None:
        """Go back through a passage from what the next stage has found."""
        passage.is_spent = True
        grad = self._up(grad_BTD).to(passage.top.dtype)
        torch.autograd.backward(passage.top, grad)

    def gradient_below(self, passage: Passage) -> Array | None:
        """Return what the stage before this one goes back from; None where nothing came from it."""
        below = passage.entered
        if below is None:
            return None
        assert below.grad is not None
        return self._transfers.download(below.grad).array()

    @contextmanager
    def moving(self, moves: bool) -> Iterator[None]:
        """Leave the trained parameters out of a graph that is to move none of them."""
        if moves:
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

    def gradients(self, passage: Passage, places: Container[Place]) -> dict[Place, Array]:
        """Return what the devices of *places* get whose rows have entered here: dL/dh of their own.

        Each is of the shape of what it has sent, (B, T, D).
        """
        scale, coming = self.trained.optimizer.loss_scale, {}
        for job, leaf in zip(passage.entering, passage.leaves, strict=True):
            if job.place in places:
                assert leaf.grad is not None
                grad = leaf.grad / (job.weight * scale)
                coming[job.place] = self._transfers.download(grad)
        return {place: grad.array() for place, grad in coming.items()}

    def final_hidden(self, passage: Passage) -> dict[Place, Array]:
        """Return what each device wants of what has come out of the last block."""
        coming, start = {}, 0
        for job in passage.jobs:
            rows, length = job.hidden_BTD.shape[:2]
            own = passage.top[start : start + rows, :length]
            coming[job.place] = self._transfers.download(own[self._wanted(job)])
            start += rows
        return {place: hidden.array() for place, hidden in coming.items()}

    def _wanted(self, job: Job) -> Any:
        """Return the index of what a device wants of the rows of its final hidden state."""
        if job.wanted_BT is None:
            return ...
        # Not the mask: the device would have to say how many it marks before anything goes on.
        return tuple(self._up(np.stack(job.wanted_BT.nonzero())))

    def average(self, served: Iterable[Job]) -> None:
        """Divide each block's gradient by the samples served in it."""
        for name, parameter in self.trained.optimizer.parameters.items():
            if parameter.grad is not None:
                parameter.grad /= self.samples(name, served)

    def samples(self, name: str, served: Iterable[Job]) -> float:
        """Count the samples whose gradients the weight *name* has seen."""
        block = self.block_of(name)
        return sum(
            job.weight if job.samples is None else job.samples
            for job in served
            if block is None or job.split <= block
        )

    # ---- losses ----

    def _losses(self, passage: Passage) -> list[LossSums]:
        """Compute a wave's losses at once, so that nothing is sliced; return them by job."""
        given = [job.labels for job in passage.jobs if job.labels is not None]
        assert len(given) == len(passage.jobs), "labels are on the device"
        longest = max(job.hidden_BTD.shape[1] for job in passage.jobs)
        labels = self._up(_joined(given, longest, IGNORED))
        rows = [len(job.lengths_B) for job in passage.jobs]
        scale = self.trained.optimizer.loss_scale
        units = [scale * job.weight / job.num_targets for job in passage.jobs]
        unit_B = self._up(np.repeat(np.array(units, np.float32), rows))
        whole = self._sums(passage.top, labels, unit_B, has_logits=passage.has_logits)
        by_job = [torch.split(column, rows) for column in whole]
        return [LossSums(*columns) for columns in zip(*by_job, strict=True)]

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

    # ---- evaluation ----

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

    def front(self, micro: MicroBatch) -> Array:
        """Return the hidden state after the last block of a stage that has the model's front."""
        self.slice.model.eval()
        ids_BT, lengths_B = (self._up(np.ascontiguousarray(x)) for x in micro[:2])
        run = partial(self.slice.front, ids_BT, lengths_B, self.stop)
        with torch.no_grad():
            hidden = self._products.run(run, lambda found: found)
            return self._transfers.download(hidden).array()

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of one micro-batch through the whole model; see `Engine`."""
        return evaluate_whole(self.slice, self._products, micro)

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the class of each sequence by the whole model; see `Engine`."""
        return predict_whole(self.slice, self._products, micro)

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the whole model adds to each prompt; see `Engine`."""
        return continue_texts(self.slice, self._products, prompts, manner)


def make_stage(spec: EngineSpec, kind: Callable[..., Kind]) -> Kind:
    """Build what *spec* says, of class *kind*."""
    config = spec.config
    stage = kind(
        load_slice(config, spec.source, spec.parts),
        spec.first,
        spec.ranks,
        config.lora,
        config.training,
        config.total_steps,
        trains_head=config.labels == "server" and spec.stop is None,
        stop=spec.stop,
        compute=config.compute,
        residual=config.residual,
    )
    planning = config.planning
    if planning.measures_importance:
        stage.trained.meter.measure(planning.importance, planning.importance_every)
    return stage


def _joined(arrays: Sequence[np.ndarray], longest: int, filler: int) -> np.ndarray:
    """Return whole numbers of several jobs under one another, with *filler* up to *longest*."""
    if arrays[0].ndim == 1:
        return np.concatenate(arrays, dtype=np.int64)
    padded = (
        np.pad(a, ((0, 0), (0, longest - a.shape[1])), constant_values=filler) for a in arrays
    )
    return np.concatenate(list(padded), dtype=np.int64)
