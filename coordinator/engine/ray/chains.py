"""Replicas side by side, each a row of stages: a wave goes up and down through all of them.

What goes from stage to stage goes there directly, through the stores of their nodes. Through the
coordinator goes what devices send and get, and the state after each step. An actor that is lost is
noticed here; what follows from it stands in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from coordinator.engine.interface import NOTHING, Answer, Carried, EngineSpec, Job, Learned
from coordinator.engine.passage import in_order, moves, serve
from coordinator.engine.ray.actor import AboutActor, FoundInPart, StageActor, StageWork, WavePart
from coordinator.engine.ray.cluster import RayCluster
from coordinator.engine.ray.cutting import (
    PARTS_A_STAGE,
    Homes,
    Portion,
    cut,
    joined,
    stretches,
    without_hidden,
)
from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums, add_up

State = dict[str, np.ndarray]


class Overflow(EdgeError):
    """A gradient did not fit into float16 at the loss scale that is due."""


class _Flow(NamedTuple):
    """A part of a wave on its way through a replica."""

    replica: int
    key: int
    number: int
    enters: int
    """The first stage that it has rows in."""
    portions: list[Portion]

    @property
    def jobs(self) -> list[Job]:
        """What stands for its rows."""
        return [portion.job for portion in self.portions]


@dataclass
class _OpenWave:
    """A wave that awaits its gradients."""

    jobs: list[Job]
    flows: list[_Flow]


class Chains:
    """Stages x replicas of actors that compute as one engine does, while none of them is lost."""

    def __init__(self, spec: EngineSpec, cluster: RayCluster) -> None:
        config, self._cluster = spec.config, cluster
        layout = spec.source.layout
        self._layout, self.first = layout, spec.first
        self.ranks = {name: rank for name, rank in spec.ranks.items() if rank}
        self._stretches = stretches(layout, spec.first, spec.parts, config.engine.stages)
        self._replicas = config.engine.replicas
        self._homes = Homes(self._replicas)
        self._served: dict[str, Job] = {}
        self._waves: list[_OpenWave] = []
        self._keys, self._epochs, self._epoch = count(), count(), -1
        threads = max(1, int(config.engine.cpus_per_actor))
        works = [
            StageWork(config, stretch, self._ranks_of(stage), replica, cluster.device, threads)
            for replica in range(self._replicas)
            for stage, stretch in enumerate(self._stretches)
        ]
        self._files = {
            path.name: path.stat().st_size for path in spec.source.folder.glob("*.safetensors")
        }
        self._actors = cluster.actors(StageActor, works)
        self._head_shapes: Mapping[str, tuple[int, ...]] = {}
        self.gather()

    def _ranks_of(self, stage: int) -> dict[str, int]:
        return {name: rank for name, rank in self.ranks.items() if self._stage_of(name) == stage}

    def _stage_of(self, name: str) -> int:
        """Return the stage that holds a weight: blocks by number, what lies behind them last."""
        block = self._layout.block_of(name)
        return len(self._stretches) - 1 if block is None else self._entry(block)

    def _entry(self, split: int) -> int:
        """Return the stage that the rows of devices with *split* blocks enter."""
        return next(i for i, stretch in enumerate(self._stretches) if stretch.takes(split))

    # ---- actors ----

    def gather(self) -> None:
        """Let every actor be there, with its part of the model, and meet the other replicas.

        Raises:
            StageLost: one of them went again.
            ConfigError: their machines do not agree with this one.
        """
        self._forget()
        abouts: list[AboutActor] = self._cluster.each("load")
        for about in abouts:
            if about.versions != abouts[0].versions:
                raise ConfigError(
                    f"engine: the cluster's nodes differ: {', '.join(abouts[0].versions)} here, "
                    f"{', '.join(about.versions)} there"
                )
            if dict(about.files) != self._files:
                raise ConfigError("engine: a node of the cluster has another model in that folder")
        self._head_shapes = abouts[len(self._stretches) - 1].head_shapes
        self._epoch, joins = next(self._epochs), []
        for stage in range(len(self._stretches)):
            actors = [self._actor(replica, stage) for replica in range(self._replicas)]
            host, port = "", None
            if self._replicas > 1:
                host = self._cluster.result(self._cluster.host_of(actors[0]))
                port = self._cluster.result(actors[0].open_store.remote(host))
            joins += [
                actor.join.remote(self._epoch, host, port, self._replicas) for actor in actors
            ]
        self._cluster.results(joins)

    def _actor(self, replica: int, stage: int) -> Any:
        return self._actors[replica * len(self._stretches) + stage]

    def _call(self, replica: int, stage: int, name: str, *args: Any, num_returns: int = 1) -> Any:
        """Begin a call of an actor's method; return a reference to each of what it returns."""
        method = self._actor(replica, stage).do.options(num_returns=num_returns)
        return method.remote(self._epoch, name, *args)

    def _of_first(self, name: str, *args: Any) -> list[Any]:
        """Return what a method brings in each stage of the first replica; the others do it too."""
        calls = [
            [self._call(replica, stage, name, *args) for stage in range(len(self._stretches))]
            for replica in range(self._replicas)
        ]
        self._cluster.results([call for calls_of in calls for call in calls_of])
        return self._cluster.results(calls[0])

    def _forget(self) -> None:
        self._served, self._waves = {}, []

    def drop_step(self) -> None:
        """Forget what the waves of the open step have left."""
        self._forget()
        self._of_first("drop_step")

    def lower_scale(self) -> None:
        """Halve the loss scale."""
        self._of_first("lower_scale")

    # ---- waves ----

    def _flows(self, jobs: Sequence[Job]) -> Iterator[_Flow]:
        num_blocks, num_stages = self._layout.num_blocks, len(self._stretches)
        num_parts = 1 if num_stages == 1 else PARTS_A_STAGE * num_stages
        number = count()
        for replica, portions in enumerate(self._homes.deal(jobs, num_blocks)):
            portions.sort(key=lambda p: (p.job.split, p.job.device, p.job.micro, p.start))
            for part in cut(portions, num_parts, num_blocks):
                enters = min(self._entry(portion.job.split) for portion in part)
                yield _Flow(replica, next(self._keys), next(number), enters, part)

    def _up(self, flow: _Flow, wave: WavePart) -> Any:
        """Begin the way of a part up to the last stage; return what that one gets of it."""
        entered = None
        for stage in range(flow.enters, len(self._stretches) - 1):
            part = self._at(flow, stage, wave)
            entered = self._call(flow.replica, stage, "rise", part, entered)
        return entered

    def _at(self, flow: _Flow, stage: int, wave: WavePart) -> WavePart:
        """Return a part as a stage gets it: what it needs and no more."""
        stretch, is_last = self._stretches[stage], stage == len(self._stretches) - 1
        jobs = []
        for job in flow.jobs:
            if stretch.takes(job.split):
                own = job if self._entry(job.split) == stage else without_hidden(job)
                jobs.append(own if is_last else _without_end(own))
        return WavePart(flow.key, jobs, wave.step, wave.wave, flow.number, wave.moves, wave.keeps)

    def _down(self, flow: _Flow, grad: Any, places: Sequence[Place]) -> list[Any]:
        """Begin the way of a part down from the last stage; return what it finds for devices."""
        founds = []
        for stage in reversed(range(flow.enters, len(self._stretches) - 1)):
            grad, found = self._call(
                flow.replica, stage, "fall", flow.key, grad, places, num_returns=2
            )
            founds.append(found)
        return founds

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave; see `Engine`.

        Raises:
            DeviceFault: a device's loss is not finite; gradients of others were accumulated.
            Overflow: likewise, a gradient is not finite.
        """
        if not jobs:
            return []
        flows, last = list(self._flows(jobs)), len(self._stretches) - 1
        about = WavePart(0, [], step, wave, 0, moves(jobs))
        learns = []
        for flow in flows:
            entered = self._up(flow, about)
            learns.append(
                self._call(
                    flow.replica,
                    last,
                    "learn",
                    self._at(flow, last, about),
                    entered,
                    num_returns=2,
                )
            )
        founds = []
        for flow, (grad, found) in zip(flows, learns, strict=True):
            places = [job.place for job in flow.jobs]
            founds.append([found, *self._down(flow, grad, places)])
        return self._answers(in_order(jobs), flows, founds)

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, keeps: bool = True
    ) -> dict[Place, Array]:
        """Run forward for a wave whose labels stay on the devices; see `Engine`."""
        if not jobs:
            return {}
        flows, last = list(self._flows(jobs)), len(self._stretches) - 1
        about = WavePart(0, [], step, wave, 0, moves(jobs), keeps)
        calls = [
            self._call(
                flow.replica, last, "top", self._at(flow, last, about), self._up(flow, about)
            )
            for flow in flows
        ]
        ordered, found = in_order(jobs), dict[Place, list[tuple[int, Array]]]()
        for flow, top in zip(flows, self._cluster.results(calls), strict=True):
            for portion in flow.portions:
                place = portion.job.place
                found.setdefault(place, []).append((portion.start, top[place]))
        if keeps:
            self._waves.append(_OpenWave(ordered, flows))
        return joined(ordered, found)

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through what `forward` has left of these micro-batches; see `Engine`."""
        waves = [w for w in self._waves if any(job.place in grads for job in w.jobs)]
        assert {job.place for wave in waves for job in wave.jobs} >= grads.keys()
        self._waves = [wave for wave in self._waves if wave not in waves]
        last, sinks = len(self._stretches) - 1, []
        for wave in waves:
            whole = {job.place: job for job in wave.jobs}
            for flow in wave.flows:
                own = {
                    p.job.place: p.of(whole[p.job.place], grads[p.job.place])
                    for p in flow.portions
                    if p.job.place in grads
                }
                call = self._call(flow.replica, last, "sink", flow.key, own, num_returns=2)
                sinks.append((flow, list(own), call))
        founds = {
            flow.key: [found, *self._down(flow, grad, places)]
            for flow, places, (grad, found) in sinks
        }
        answers = []
        for wave in waves:
            ordered = [job for job in wave.jobs if job.place in grads]
            own_founds = [founds[flow.key] for flow in wave.flows]
            answers += self._answers(ordered, wave.flows, own_founds)
        return answers

    def _answers(
        self, jobs: Sequence[Job], flows: Sequence[_Flow], founds: Sequence[Sequence[Any]]
    ) -> list[Answer]:
        """Wait for what the parts of a wave have found, and put it together for its devices."""
        results = iter(self._cluster.results([ref for refs in founds for ref in refs]))
        grads = dict[Place, list[tuple[int, Array]]]()
        sums = dict[Place, list[TailSums]]()
        scale = 1.0
        for flow, references in zip(flows, founds, strict=True):
            starts = {portion.job.place: portion.start for portion in flow.portions}
            for _ in references:
                found: FoundInPart = next(results)
                scale = max(scale, found.scale)
                for place, grad in found.grads.items():
                    grads.setdefault(place, []).append((starts[place], grad))
                for place, own in found.sums.items():
                    sums.setdefault(place, []).append(own)
        if scale > 1.0 and not all(
            np.isfinite(grad).all() for pieces in grads.values() for _, grad in pieces
        ):
            raise Overflow(f"a gradient is not finite at the loss scale {scale:g}")
        whole, answers = joined(jobs, grads), []
        for job in jobs:
            total = add_up(sums[job.place]) if job.place in sums else None
            answers.append(Answer(job.device, whole[job.place], total, job.micro))
            serve(self._served, without_hidden(_without_end(job)))
        return answers

    def finish_step(self, step: int) -> tuple[bool, list[Any]]:
        """Update the adapters; see `Engine`.

        Returns:
            What `Engine.finish_step` does, and a reference to the state of each stage after it.
        """
        served = list(self._served.values())
        self._forget()
        found = self._of_first("collect", step, served)
        norms = np.array([n for own, _ in found for n in own], np.float32)
        norm = float(np.linalg.norm(norms)) if len(norms) else 0.0
        has_left = any(left for _, left in found)
        calls = [
            self._call(replica, stage, "update", step, norm, served, has_left, num_returns=2)
            for replica in range(self._replicas)
            for stage in range(len(self._stretches))
        ]
        done = self._cluster.results([is_done for is_done, _ in calls])
        states = [state for _, state in calls[: len(self._stretches)]]
        self._cluster.fetch(states)
        return all(done), states

    def fetch(self, references: Sequence[Any]) -> list[State]:
        """Wait for the states that `finish_step` has promised."""
        return self._cluster.results(references)

    # ---- evaluation ----

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return an evaluation micro-batch's loss, or its final hidden state; see `Engine`."""
        replica = self._homes.of(job.device)
        enters = self._entry(job.split)
        last = len(self._stretches) - 1
        if enters == last:
            found: TailSums | Array
            found = self._cluster.result(self._call(replica, last, "evaluate", job))
            return _own(found)
        below = self._call(replica, enters, "evaluate", _without_end(job))
        return self._finish_evaluation(replica, enters + 1, job, below)

    def _finish_evaluation(
        self, replica: int, stage: int, job: Job, below: Any
    ) -> TailSums | Array:
        rest, last = without_hidden(job), len(self._stretches) - 1
        for middle in range(stage, last):
            below = self._call(replica, middle, "evaluate_next", _without_end(rest), below)
        found: TailSums | Array
        found = self._cluster.result(self._call(replica, last, "evaluate_next", rest, below))
        return _own(found)

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of a micro-batch through the whole model; see `Engine`."""
        if len(self._stretches) == 1:
            found: TailSums = self._cluster.result(self._call(0, 0, "evaluate_whole", micro))
            return found
        below = self._call(0, 0, "front", micro)
        rows, length = micro.input_ids.shape
        job = Job(
            "",
            self.first,
            float(rows),
            micro.num_targets,
            np.empty((rows, length, 0), np.float32),
            micro.lengths,
            micro.labels,
            micro.input_ids if self._layout.needs_ids else None,
            micro.pooled,
        )
        sums = self._finish_evaluation(0, 1, job, below)
        assert isinstance(sums, TailSums)
        return sums

    def ask_whole(self, name: str, *args: Any) -> Any:
        """Return what a method brings of the one stage that has the whole model."""
        assert len(self._stretches) == 1, "the config refuses it with more stages"
        return self._cluster.result(self._call(0, 0, name, *args))

    # ---- between rounds ----

    def head_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the head's parameters; see `Engine`."""
        return self._head_shapes

    def learned(self) -> Learned:
        """Return what this round has made of the engine's weights; see `Engine`."""
        found: list[Learned] = self._of_first("learned")
        return Learned(*(_merged([own[i] for own in found]) for i in range(3)))

    def carried(self) -> Carried:
        """Return what the next engine goes on with; see `Engine`."""
        found: list[Carried] = self._of_first("carried")
        return Carried(_merged([own.head for own in found]), _merged([o.moments for o in found]))

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> list[State]:
        """Hold what a new engine of this run has to; return the state of each stage."""
        self._forget()
        own = [self._shared(pairs), self._shared(residuals)]
        carries: list[Carried | None] = [None] * len(self._stretches)
        if carried is not None:
            heads, moments = self._shared(carried.head), self._shared(carried.moments)
            carries = [Carried(h, m) for h, m in zip(heads, moments, strict=True)]
        return self._spread("begin", [*own, carries])

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        restarts: bool = False,
    ) -> list[State]:
        """Take over what an aggregation hands out; return the state of each stage."""
        self._forget()
        shared = [self._shared(changes), self._shared(replaced), self._shared(head)]
        return self._spread("take", [*shared, [restarts] * len(self._stretches)])

    def load_state(self, state: Mapping[str, np.ndarray]) -> list[State]:
        """Take over what `state` returned; return the state of each stage."""
        return self.load(self._shared(state))

    def load(self, states: Sequence[State]) -> list[State]:
        """Take over the state of each stage; return it again."""
        self._forget()
        return self._spread("load_state", [states])

    def state(self) -> State:
        """Return everything that a restart needs; see `Engine`."""
        return {**_merged(self._of_first("state")), "first": np.array(self.first)}

    def _shared(self, named: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Deal out by stage what is named by weight, with or without a kind before it."""
        found: list[dict[str, Any]] = [{} for _ in self._stretches]
        for name, value in named.items():
            weight = name.partition(":")[2] or name
            if weight in EVERYWHERE:
                for own in found:
                    own[name] = value
            else:
                found[self._stage_of(weight)][name] = value
        return found

    def _spread(self, name: str, args: Sequence[Sequence[Any]]) -> list[State]:
        """Call a method with each stage's own arguments in all replicas; return what it brings."""
        calls = [
            [
                self._call(replica, stage, name, *(each[stage] for each in args))
                for stage in range(len(self._stretches))
            ]
            for replica in range(self._replicas)
        ]
        self._cluster.results([call for own in calls for call in own])
        return self._cluster.results(calls[0])

    def close(self) -> None:
        """Let go of the actors."""
        self._cluster.dismiss()


# Entries of a state that all stages have: the first block is told anew by each.
EVERYWHERE = ("first", "loss_scale", "left_float16")


def _without_end(job: Job) -> Job:
    """Return *job* as stages need it that do not hold the model's end."""
    return replace(job, labels=None, pooled_B=None, wanted_BT=None)


def _own(found: TailSums | Array) -> TailSums | Array:
    """Return an array as one that nobody else has."""
    return found if isinstance(found, tuple) else found.copy()


def _merged(dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for own in dicts for name, value in own.items()}
