"""Both halves of a model that costs next to nothing: for tests of everything around it.

Each half multiplies what comes in by one number, which all of its factors and residuals have a part
in: whatever is lost or counted twice shows in every number that follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.engine.interface import (
    NOTHING,
    Answer,
    Carried,
    EngineSpec,
    Job,
    Learned,
)
from edge_sdk.client.backends import ONNXRUNTIME, RuntimeRequest
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.numpy_adapters import NumpyAdapters
from edge_sdk.lora.targets import LoraConfig, Shape, find_targets
from edge_sdk.model.safetensors_files import map_part
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums, process_memory
from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.runtime.training_state import NumpyTrainingState

SHARE = np.float32(0.1)


class _Half:
    """What is trained on one side, and the number that it stands for."""

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        lora: LoraConfig,
        training: TrainingConfig,
        total_steps: int,
    ) -> None:
        adapters = NumpyAdapters(shapes, ranks, alphas, lora, training.seed)
        self.optimizer = NumpyOptimizer(adapters.parameters, training, total_steps)
        self.open: deque[Any] = deque()
        """What forward passes have left."""
        self.trained = NumpyTrainingState(adapters, self.optimizer, ranks, {}, self.open)
        self.adapters = adapters

    def factor(self) -> np.float32:
        """Return by what all that comes in is multiplied."""
        total = np.float32(1.0)
        for name in self.adapters.shapes:
            held = self.adapters.factors(name)
            total += SHARE * np.float32(held["B"][0] @ held["A"][:, 0])
            total += SHARE * np.float32(held["U"][0] @ held["V"][:, 0])
        return total

    def learn(self, slope: float) -> None:
        """Add to all gradients what *slope*, that of the loss over the factor, makes of them."""
        adapters = self.adapters
        for name in adapters.ranks:
            a_RI, b_OR = (adapters.parameters[f"{name}.{f}"] for f in "AB")
            by_a, by_b = np.zeros_like(a_RI), np.zeros_like(b_OR)
            share = SHARE * np.float32(slope * adapters.scale(name))
            by_a[:, 0], by_b[0] = share * b_OR[0], share * a_RI[:, 0]
            self.optimizer.add_gradient(f"{name}.A", by_a)
            self.optimizer.add_gradient(f"{name}.B", by_b)


def _slope(grad_BTD: Array, hidden_BTD: Array) -> float:
    return float(np.vdot(grad_BTD, hidden_BTD))


def _count(labels: np.ndarray | None) -> int:
    assert labels is not None
    return int((labels[:, 1:] != -100).sum())


def _sums(final_BTD: Array, count: int) -> TailSums:
    """Return the loss of a final hidden state: the smaller the better."""
    return TailSums(0.5 * float(np.vdot(final_BTD, final_BTD)), count, 0)


class LightRuntime(_Half):
    """A device's half."""

    has_local_tail = False

    def __init__(self, request: RuntimeRequest) -> None:
        stored = {n: t for part in request.parts for n, t in map_part(request.fetch(part)).items()}
        plan = request.plan
        shapes = {n: Shape(*stored[f"{n}.weight"].array.shape) for n in plan.ranks}
        super().__init__(
            shapes, plan.ranks, plan.alphas, request.lora, request.training, request.total_steps
        )
        self.state = self.trained
        self.table = stored["model.embed_tokens.weight"].float32()

    def forward(self, micro: MicroBatch, _step: int = 0, _index: int = 0) -> Array:
        """Look the tokens up, and multiply them."""
        hidden_BTD = self.table[micro.input_ids]
        self.open.append(hidden_BTD)
        return hidden_BTD * self.factor()

    def forward_eval(self, micro: MicroBatch) -> Array:
        """Do the same, and keep nothing."""
        return self.table[micro.input_ids] * self.factor()

    def backward(self, grad_BTD: Array) -> None:
        """Learn from a gradient."""
        self.learn(_slope(grad_BTD, self.open.popleft()))

    def tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, num_targets: int
    ) -> tuple[TailSums, Array]:
        """Return loss and gradient."""
        return self.tail_eval(final_hidden_BTD, micro), final_hidden_BTD / np.float32(num_targets)

    def tail_eval(self, final_hidden_BTD: Array, micro: MicroBatch) -> TailSums:
        """Return the loss."""
        return _sums(final_hidden_BTD, _count(micro.labels))

    def local(self, micro: MicroBatch, num_targets: int, step: int, index: int) -> TailSums:
        """Do all of it here."""
        sums, grad_BTD = self.tail(self.forward(micro, step, index), micro, num_targets)
        self.backward(grad_BTD)
        return sums

    def step(self, step: int) -> None:
        """Update the factors."""
        assert self.optimizer.step(step)

    memory_in_use = staticmethod(process_memory)
    most_bytes = staticmethod(lambda: 1 << 20)


LIGHT = replace(ONNXRUNTIME, name="light", needs=("numpy",), make=LightRuntime, wants_graphs=False)


_SHAPES: dict[int, dict[str, Shape]] = {}


def _shapes(spec: EngineSpec) -> dict[str, Shape]:
    """Return the weights of a model, found once."""
    source = spec.source
    if id(source) not in _SHAPES:
        found = find_targets(source.config, spec.config.task, source.layout, spec.config.lora)
        _SHAPES[id(source)] = found
    return _SHAPES[id(source)]


class LightEngine(_Half):
    """The coordinator's half."""

    def __init__(self, spec: EngineSpec) -> None:
        config = spec.config
        shapes = {name: _shapes(spec)[name] for name in spec.ranks}
        super().__init__(shapes, spec.ranks, {}, config.lora, config.training, config.total_steps)
        self.first, self.ranks = spec.first, self.adapters.ranks

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return nothing: there is no head."""
        return {}

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Go forward and backward; see `Engine`."""
        final = self.forward(jobs, step, wave)
        counts = {job.place: np.float32(job.num_targets) for job in jobs}
        answers = self.backward({place: hidden / counts[place] for place, hidden in final.items()})
        own = {job.place: _count(job.labels) for job in jobs}
        sums = {place: _sums(hidden, own[place]) for place, hidden in final.items()}
        return [replace(a, sums=sums[a.device, a.micro]) for a in answers]

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Go forward; see `Engine`."""
        here = sorted(jobs, key=lambda job: job.place)
        self.open.extend(here if keeps else ())
        factor = self.factor()
        return {job.place: job.hidden_BTD * factor for job in here}

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go backward; see `Engine`."""
        jobs, factor = [job for job in self.open if job.place in grads], self.factor()
        rest = [job for job in self.open if job.place not in grads]
        self.open.clear()
        self.open.extend(rest)
        for job in jobs:
            self.learn(_slope(grads[job.place], job.hidden_BTD) / len(jobs))
        return [Answer(j.device, grads[j.place] * factor, None, j.micro) for j in jobs]

    def finish_step(self, step: int) -> bool:
        """Update the factors; see `Engine`."""
        self.open.clear()
        return self.optimizer.step(step)

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return loss or final hidden state; see `Engine`."""
        final_BTD = job.hidden_BTD * self.factor()
        if job.labels is None:
            return final_BTD
        return _sums(final_BTD, _count(job.labels))

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Fail: there is no file to evaluate."""
        raise NotImplementedError

    def learned(self) -> Learned:
        """Return what the round has taught; see `Engine`."""
        return Learned(self.adapters.pairs(), {}, self.trained.meter.take())

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        *,
        restarts: bool = False,
    ) -> None:
        """Take over an aggregation; see `Engine`."""
        self.adapters.load_pairs(replaced)
        self.trained.merge_change({n: c for n, c in changes.items() if n in self.ranks})
        if restarts:
            self.trained.load_moments({})
        self.trained.begin_round()

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> None:
        """Hold what a new engine has to; see `Engine`."""
        self.adapters.load_pairs(pairs)
        self.trained.set_residual({n: f for n, f in residuals.items() if n in self.ranks})
        if carried is not None:
            self.trained.load_moments(carried.moments)
        self.trained.begin_round()

    def carried(self) -> Carried:
        """Return what the next engine goes on with; see `Engine`."""
        return Carried({}, self.trained.moments())

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs; see `Engine`."""
        return {"first": np.array(self.first), **self.trained.checkpoint()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.trained.restore(state)
