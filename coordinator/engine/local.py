"""The coordinator's share of the model: many devices, cut anywhere, one forward and one backward.

`LocalEngine` runs in this process, as one stage that holds all of the share; what it is asked for
stands in `interface.py`, how it computes in `stage.py`. It knows no network and no rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

from coordinator.config.run import ServeConfig
from coordinator.engine.interface import Answer, EngineMaker, EngineSpec, Job
from coordinator.engine.passage import Passage, moves, serve
from coordinator.engine.stage import Stage, make_stage
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums


class LocalEngine(Stage):
    """Blocks first .. L-1 with adapters and optimizer, in this process."""

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave; see `Engine`.

        Raises:
            DeviceFault: a device's loss is not finite; nothing was accumulated.
        """
        if not jobs:  # the devices of this micro-batch have left
            return []

        def attempt() -> tuple[Passage, list[TailSums]]:
            own = self.run(jobs, step, wave, to_logits=not self.slice.has_local_tail)
            return own, self.learn(own)

        with self.moving(moves(jobs)):
            own, sums = self.trained.optimizer.scaled(attempt, lambda found: found[0].gradients())
        return self._answers(own, sums, {job.place for job in jobs})

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Run forward for a wave whose labels stay on the devices; see `Engine`."""
        if not jobs:
            return {}
        with self.moving(moves(jobs)):
            own = self.run(jobs, step, wave)
        if keeps:
            self.open_step.waves.append(own)
        return self.final_hidden(own)

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through what `forward` has left of these micro-batches; see `Engine`."""
        waves = self.open_step.waves_of(grads)
        places = {job.place for wave in waves for job in wave.jobs}
        assert places >= grads.keys(), "backward without forward"
        answers = [answer for wave in waves for answer in self._go_back(wave, grads)]
        self.open_step.waves = [wave for wave in self.open_step.waves if wave not in waves]
        return answers

    def _go_back(self, wave: Passage, grads: Mapping[Place, Array]) -> list[Answer]:
        def attempt() -> Passage:
            own = self.run(wave.jobs, wave.step, wave.number) if wave.is_spent else wave
            wave.is_spent = True
            self.pull(own, grads)
            return own

        with self.moving(moves(wave.jobs)):
            done = self.trained.optimizer.scaled(attempt, Passage.gradients)
        return self._answers(done, [None] * len(done.jobs), grads)

    def _answers(
        self, wave: Passage, sums: Sequence[TailSums | None], places: Container[Place]
    ) -> list[Answer]:
        grads, answers = self.gradients(wave, places), []
        for job, own in zip(wave.jobs, sums, strict=True):
            if job.place in grads:
                answers.append(Answer(job.device, grads[job.place], own, job.micro))
                serve(self.open_step.served, job)
        return answers

    def finish_step(self, step: int) -> bool:
        """Divide each block's gradient by the samples served in it, clip, update."""
        served = list(self.open_step.served.values())
        self.open_step.clear()  # also of waves whose devices have all left
        scale = self.trained.optimizer.loss_scale
        self.average(served)
        is_done = self.trained.optimizer.step(step)
        self.trained.meter.close_step(step, lambda name: scale * self.samples(name, served))
        return is_done


def make_local(spec: EngineSpec, kind: Callable[..., LocalEngine] = LocalEngine) -> LocalEngine:
    """Build an engine in this process, of class *kind*."""
    return make_stage(spec, kind)


@contextmanager
def local_engines(_config: ServeConfig) -> Iterator[EngineMaker]:
    """Have what makes engines in this process, while a run lasts."""
    yield make_local
