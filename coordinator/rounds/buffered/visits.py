"""Run micro-batches through the coordinator's blocks as they come, and send out what comes back.

Whose they are and of which step does not matter: docs/method.md, Rounds without a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from coordinator.engine.interface import Answer
from coordinator.results.events.rounds import StepSkipped
from coordinator.rounds.buffered.model import BufferedModel
from coordinator.rounds.buffered.run import BufferedRun, Visit
from coordinator.rounds.waves import TOP, WaveRunner
from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.messages import Gradient, TopHidden


class VisitRunner(WaveRunner):
    """What is computed between two merges, in the worker's thread."""

    _run: BufferedRun
    _learned: BufferedModel

    def visit(self) -> bool:
        """Run the micro-batch that came first; return whether there was one."""
        visit = self._run.inputs.next_visit()
        if visit is None:
            return False
        compute: Callable[[Visit], Any] = self._go_back
        then: Callable[[Visit, Any], None] = self._answer_to
        if visit.job.labels is not None:
            compute = self._train
        elif visit.grad is None:
            compute, then = self._final_hidden, self._show_top
        safely = partial(self._compute, partial(compute, visit), [visit.job])
        self._worker.start(safely, partial(then, visit), "wave", [visit.job.device])
        return True

    def _train(self, visit: Visit) -> Answer:
        (answer,) = self._learned.engine.train([visit.job], *visit.where)
        return answer

    def _final_hidden(self, visit: Visit) -> Array:
        engine = self._learned.engine
        (hidden_BTD,) = engine.forward([visit.job], *visit.where, keeps=False).values()
        return hidden_BTD

    def _go_back(self, visit: Visit) -> Answer:
        """Go forward again, and back: others have moved the blocks since the first time."""
        assert visit.grad is not None
        engine = self._learned.engine
        (place,) = engine.forward([visit.job], *visit.where)
        num_micro = {visit.job.device: visit.message.num_micro}
        grads = {place: visit.grad}
        bounded = self._learned.top_gradients.bounded(visit.where[0], grads, num_micro)
        (answer,) = engine.backward(bounded)
        return answer

    def _is_gone(self, visit: Visit) -> bool:
        return not self._run.is_current(visit.message.stamp)

    def _show_top(self, visit: Visit, hidden_BTD: Array) -> None:
        name = visit.job.device
        if self._is_gone(visit):
            return
        if not np.isfinite(hidden_BTD).all():
            self._run.faults.accuse(
                name, NumericError("the blocks cannot take what it sent: not finite")
            )
            return
        self._run.await_gradient(visit)
        message = TopHidden(stamp=visit.message.stamp, micro=visit.message.micro)
        self._admission.send(name, message, {"hidden": self._coded(name, hidden_BTD, TOP)})

    def _answer_to(self, visit: Visit, answer: Answer) -> None:
        name = visit.job.device
        if visit.counts:
            self._learned.buffer.serve(visit.job.split, visit.job.samples or 0.0)
        is_gone = self._is_gone(visit)
        self._run.answered(visit, is_gone=is_gone)
        if is_gone:
            return
        if not np.isfinite(answer.grad_BTD).all():
            self._run.faults.accuse(
                name, NumericError("the gradient of what it sent is not finite")
            )
            return
        with self._admission.part_of(name):
            message = Gradient(
                stamp=visit.message.stamp,
                micro=visit.message.micro,
                loss_sum=answer.sums.loss_sum if answer.sums else 0.0,
            )
            grad = {"grad": self._coded(name, answer.grad_BTD, "gradients")}
            is_frozen = self._admission.plans[name].is_forward_only
            self._admission.send(name, message, {} if is_frozen else grad)

    def finish_step(self) -> None:
        """Let the coordinator's blocks take their step on what they have seen."""
        step = self._run.tours.schedule_step
        compute = partial(self._learned.engine.finish_step, step)
        self._worker.start(compute, partial(self._step_done, step), "adapters")

    def _step_done(self, step: int, was_finite: bool) -> None:
        if not was_finite:
            self._run.watcher.see(StepSkipped(step))
        self._run.tours.finish_step()
