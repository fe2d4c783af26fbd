"""What the coordinator asks of an engine can be shared out over several: `Engine` is all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import pytest
import torch

from coordinator.engine.interface import Answer, Engine, EngineSpec, Job
from coordinator.engine.local import LocalEngine, make_local
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.plan import Place
from tests.coordinator.engine.test_local import make_engine, make_jobs, tail_gradients
from tests.e2e.cluster import Cluster, save_model, wait_all

P = ParamSpec("P")
T = TypeVar("T")


def on_each(*calls: Callable[P, T]) -> Callable[P, T]:
    """Return a function that calls all of *calls* and returns what the last one does."""
    return lambda *args, **settings: [call(*args, **settings) for call in calls][-1]


class ShardedEngine:
    """Every other device of a wave goes to the second of two engines; both make the same step."""

    def __init__(self, one: LocalEngine, two: LocalEngine) -> None:
        self._one, self._two = one, two
        self._ones: set[Place] = set()
        self.first, self.ranks, self.head_shapes = one.first, one.ranks, one.head_shapes
        self.evaluate, self.evaluate_whole = one.evaluate, one.evaluate_whole
        self.carried, self.state = one.carried, one.state
        self.learned = on_each(one.learned, two.learned)
        self.begin, self.take = on_each(one.begin, two.begin), on_each(one.take, two.take)
        self.close = one.close
        self.load_state = on_each(one.load_state, two.load_state)

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Deal the devices."""
        return self._one.train(jobs[::2], step, wave) + self._two.train(jobs[1::2], step, wave)

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Deal the devices."""
        ones, twos = jobs[::2], jobs[1::2]
        self._ones |= {job.place for job in ones}
        one = self._one.forward(ones, step, wave, keeps=keeps)
        return one | self._two.forward(twos, step, wave, keeps=keeps)

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Give each its devices' gradients."""
        ones = {place: grads[place] for place in grads if place in self._ones}
        twos = {place: grads[place] for place in grads if place not in self._ones}
        self._ones -= ones.keys()
        return self._one.backward(ones) + self._two.backward(twos)

    def finish_step(self, step: int) -> bool:
        """Add up the gradients, and who was served."""
        one, two = self._one.open_step, self._two.open_step
        one.served = two.served = {**one.served, **two.served}
        for name, mine in self._one.trained.optimizer.parameters.items():
            other = self._two.trained.optimizer.parameters[name]
            if grads := [p.grad for p in (mine, other) if p.grad is not None]:
                mine.grad, other.grad = (torch.stack(grads).sum(0) for _ in range(2))
        return all([self._one.finish_step(step), self._two.finish_step(step)])


def make_sharded(spec: EngineSpec) -> Engine:
    """Build it as the coordinator does."""
    return ShardedEngine(make_local(spec), make_local(spec))


@pytest.mark.parametrize("labels", ["server", "device"])
def test_two_engines_make_the_step_of_one(labels: str) -> None:
    """Answers, weights and moments after two steps are those of one engine to 1e-5."""
    plain, jobs = make_engine("llama"), make_jobs("llama")
    sharded = ShardedEngine(make_engine("llama"), make_engine("llama"))
    engines: tuple[Engine, Engine] = plain, sharded

    answers: list[dict[str, Array]] = []
    for engine in engines:
        for step in range(2):
            if labels == "server":
                found = engine.train(jobs, step, 0)
            else:
                final_hidden = engine.forward(jobs, step, 0)
                found = engine.backward(tail_gradients(plain, jobs, final_hidden))
            assert engine.finish_step(step)
        answers.append({answer.device: answer.grad_BTD for answer in found})

    for expected, result in ((answers[0], answers[1]), (plain.state(), sharded.state())):
        assert result.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(result[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_run_on_another_engine_is_the_same_run(tmp_path: Path) -> None:
    """One registration, and a whole run with its evaluations gives the losses of one engine."""
    losses = []
    for name in ("local", "sharded"):
        (tmp_path / name).mkdir()
        model = save_model("llama", tmp_path / name / "model")
        cluster = Cluster(tmp_path / name, model, tmp_path / "parts")
        try:
            serving = cluster.serve(make_engine=make_sharded if name == "sharded" else None).start()
            clients = cluster.start()
            assert serving.wait() == "completed"
            wait_all(clients)
        finally:
            cluster.close()
        losses.append([row.get("train_loss", 0.0) for row in serving.rows])

    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
