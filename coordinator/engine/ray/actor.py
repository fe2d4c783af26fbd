"""What an actor does: it holds one stage of one replica, in a process of its own.

It is called by the coordinator alone, one call at a time, in order. Knows nothing of Ray.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch

from coordinator.config.run import ServeConfig
from coordinator.engine.interface import NOTHING, Carried, EngineSpec, Job, Learned
from coordinator.engine.passage import Entered, Passage
from coordinator.engine.ray.cutting import Stretch
from coordinator.engine.ray.replica_group import (
    ReplicaGroup,
    StageLost,
    find_store,
    open_store,
    use_interface,
)
from coordinator.engine.stage import Stage, make_stage
from coordinator.engine.whole import Manner
from edge_sdk.data.batches import IntArray, MicroBatch
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums
from profiler.sensors.memory import keep_freed

# What does not change between two hand-outs, and is not in the state of every step.
LASTING = ("residual:", "before:")


class StageWork(NamedTuple):
    """What an actor is made for."""

    config: ServeConfig
    stretch: Stretch
    ranks: Mapping[str, int]
    """Ranks of the stage's own adapters."""
    replica: int
    device: str
    """Where it computes."""
    threads: int


class AboutActor(NamedTuple):
    """What an actor says of itself."""

    versions: tuple[str, ...]
    """Of what has to be the same everywhere."""
    files: Mapping[str, int]
    """The model's files that it sees, and their bytes."""
    head_shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WavePart:
    """A part of a wave, as one stage gets it."""

    key: int
    """What it is known by until its backward pass."""
    jobs: list[Job]
    """Those with rows here; the hidden states of those that enter here alone."""
    step: int
    wave: int
    number: int
    """Its number among the parts of the wave."""
    moves: bool
    """Whether the stage's adapters learn from it."""
    keeps: bool = True
    """Whether there will be a backward pass."""


class FoundInPart(NamedTuple):
    """What a backward pass has found for devices."""

    grads: Mapping[Place, Array]
    sums: Mapping[Place, TailSums]
    """Losses, where the labels are here."""
    scale: float
    """The loss scale that it was found with."""


class StageActor:
    """A stage, and its place among the replicas."""

    def __init__(self, work: StageWork) -> None:
        self._work = work
        self._epoch: int | None = None
        """When it was last told where the run stands; None: it was not since it has begun."""
        self._stage: Stage | None = None
        self._group: ReplicaGroup | None = None
        self._store: Any = None
        self._open: dict[int, Passage] = {}

    def do(self, epoch: int, name: str, *args: Any) -> Any:
        """Do what is asked for, if whoever asks knows what this process holds.

        Raises:
            StageLost: the process has begun anew since, or it was asked before something was lost.
        """
        if epoch != self._epoch:
            raise StageLost("an actor has begun anew")
        return getattr(self, name)(*args)

    # ---- beginnings ----

    def load(self) -> AboutActor:
        """Read the model's parts, unless they are here, and forget what has been done with them."""
        self._epoch = None
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._stage is None:
            # Arrays from other processes are read-only, and nothing here writes into them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            torch.set_num_threads(self._work.threads)
            keep_freed()
            self._stage = self._make_stage()
        folder = self._source.folder
        files = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        versions = tuple(f"{name} {version(name)}" for name in ("edgesplit", "torch"))
        python = f"Python {'.'.join(platform.python_version_tuple()[:2])}"
        return AboutActor((*versions, python), files, self._stage.head_shapes())

    def _make_stage(self) -> Stage:
        config, stretch = self._work.config, self._work.stretch
        self._source = ModelSource(
            config.model,
            config.task,
            num_labels=len(config.label_names),
            revision=config.revision,
        )
        self._source.load_whole(config.training.seed)
        here = replace(config, device=self._work.device)
        first, stop, parts = stretch
        return make_stage(
            EngineSpec(here, self._source, parts, first, self._work.ranks, stop), Stage
        )

    @property
    def stage(self) -> Stage:
        """The stage, which `load` has made."""
        assert self._stage is not None
        return self._stage

    def open_store(self, host: str) -> int:
        """Open the place at which the replicas of this stage meet, and return its port."""
        self._store = open_store(host)
        return int(self._store.port)

    def join(self, epoch: int, host: str, port: int | None, size: int) -> None:
        """Be part of the engine from now on, and meet the other replicas where there are any."""
        self.drop_step()
        if size > 1 and port is not None:
            use_interface(host)
            store = self._store if self._work.replica == 0 else find_store(host, port)
            device = torch.device(self._work.device)
            self._group = ReplicaGroup(store, self._work.replica, size, device)
        self._epoch = epoch

    def pid(self) -> int:
        """Return the process."""
        return os.getpid()

    # ---- waves ----

    def _run(self, part: WavePart, entered: Entered | None, *, to_logits: bool) -> Passage:
        with self.stage.moving(part.moves):
            passage = self.stage.run(
                part.jobs,
                part.step,
                part.wave,
                to_logits=to_logits,
                entered=entered,
                part=part.number,
            )
        if part.keeps:
            self._open[part.key] = passage
        return passage

    def rise(self, part: WavePart, entered: Entered | None) -> Entered:
        """Run a part forward, to the next stage."""
        return self.stage.hand_on(self._run(part, entered, to_logits=False))

    def top(self, part: WavePart, entered: Entered | None) -> dict[Place, Array]:
        """Run a part through the last stage, and return what the devices get."""
        return self.stage.final_hidden(self._run(part, entered, to_logits=False))

    def learn(self, part: WavePart, entered: Entered | None) -> tuple[Array | None, FoundInPart]:
        """Run a part through the last stage and back, from its loss.

        Raises:
            DeviceFault: a device's loss is not finite.
        """
        to_logits = not self.stage.slice.has_local_tail
        passage = self._run(part, entered, to_logits=to_logits)
        sums = self.stage.learn(passage)
        places = [job.place for job in passage.jobs]
        return self._down(part.key, set(places), dict(zip(places, sums, strict=True)))

    def sink(self, key: int, grads: Mapping[Place, Array]) -> tuple[Array | None, FoundInPart]:
        """Go back through the last stage, from what the devices have sent."""
        self.stage.pull(self._open[key], grads)
        return self._down(key, set(grads))

    def fall(
        self, key: int, grad_BTD: Array, places: Sequence[Place]
    ) -> tuple[Array | None, FoundInPart]:
        """Go back through a stage, from what the next one has found."""
        self.stage.fall(self._open[key], grad_BTD)
        return self._down(key, set(places))

    def _down(
        self, key: int, places: set[Place], sums: Mapping[Place, TailSums] | None = None
    ) -> tuple[Array | None, FoundInPart]:
        """Return what the stage below gets, and what devices do."""
        passage, stage = self._open.pop(key), self.stage
        found = FoundInPart(
            stage.gradients(passage, places), sums or {}, stage.trained.optimizer.loss_scale
        )
        return stage.gradient_below(passage), found

    def drop_step(self) -> None:
        """Forget what the waves of the open step have left."""
        self._open.clear()
        self.stage.trained.forget_step()

    def lower_scale(self) -> None:
        """Halve the loss scale."""
        self.stage.trained.optimizer.lower_scale()

    # ---- updates ----

    def collect(self, step: int, served: Sequence[Job]) -> tuple[list[float], bool]:
        """Add up what all replicas have found in a step, and take the mean over its samples.

        Returns:
            The 2-norm of each parameter's gradient, and whether the stage has left float16.
        """
        trained = self.stage.trained
        if self._group is not None:
            parameters = list(trained.optimizer.parameters.values())
            sums = self._group.add_up([p.grad for p in parameters])
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.grad = (
                    None if total is None else total.to(parameter.device).view_as(parameter)
                )
            if trained.meter.is_due(step):
                raw = self._group.add_up(trained.meter.measured(step))
                trained.meter.take_over(step, raw)
        self.stage.average(served)
        return trained.optimizer.norms(), self.stage.has_left

    def update(
        self, step: int, norm: float, served: Sequence[Job], has_left: bool
    ) -> tuple[bool, dict[str, np.ndarray] | None]:
        """Update the adapters, which all stages do or none.

        Args:
            step: The step that ends.
            norm: The 2-norm of the gradients of all stages.
            served: Who was served in it.
            has_left: Whether a stage has left float16.

        Returns:
            What `Engine.finish_step` does, and the state of the first replica; None of the others.
        """
        stage, trained = self.stage, self.stage.trained
        if has_left:
            stage.leave_float16()
        self._open.clear()
        scale = trained.optimizer.loss_scale
        is_done = trained.optimizer.update(step, norm)
        trained.meter.close_step(step, lambda name: scale * stage.samples(name, served))
        return is_done, None if self._work.replica else self.snapshot(whole=False)

    def snapshot(self, whole: bool) -> dict[str, np.ndarray]:
        """Return the stage's state; not *whole*: without what only a hand-out changes."""
        state = self.stage.state()
        return {n: v for n, v in state.items() if whole or not n.startswith(LASTING)}

    # ---- evaluation ----

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return the loss of an evaluation micro-batch, or its final hidden state."""
        return self.stage.evaluate(job)

    def evaluate_next(self, job: Job, below: Array) -> TailSums | Array:
        """Do so with what the stage below has made of it."""
        return self.stage.evaluate(replace(job, hidden_BTD=below, split=self.stage.first))

    def front(self, micro: MicroBatch) -> Array:
        """Return the hidden state after this stage's last block, from token ids."""
        return self.stage.front(micro)

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of a micro-batch through the whole model, which is in this stage."""
        return self.stage.evaluate_whole(micro)

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the class of each sequence, by the whole model, which is in this stage."""
        return self.stage.predict_whole(micro)

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the whole model, which is in this stage, adds to each."""
        return self.stage.continue_texts(prompts, manner)

    # ---- between rounds ----

    def learned(self) -> Learned:
        """Return what the round has made of the stage's weights."""
        return self.stage.learned()

    def carried(self) -> Carried:
        """Return what the next engine goes on with."""
        return self.stage.carried()

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> dict[str, np.ndarray]:
        """Hold what a new engine of this run has to; return the state."""
        self.stage.begin(pairs, residuals, carried)
        return self.snapshot(whole=True)

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        restarts: bool,
    ) -> dict[str, np.ndarray]:
        """Take over what an aggregation hands out; return the state."""
        self.stage.take(changes, replaced, head, restarts=restarts)
        return self.snapshot(whole=True)

    def load_state(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take over what `state` returned; return it again."""
        self._open.clear()
        self.stage.load_state(state)
        return self.snapshot(whole=True)

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs."""
        return self.stage.state()
