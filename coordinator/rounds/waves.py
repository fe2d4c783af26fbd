"""Run waves and evaluations on the coordinator's own blocks, and send out what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from coordinator.engine.compute_thread import Worker, owned
from coordinator.engine.interface import Answer, Job
from coordinator.gateway.interface import Event
from coordinator.results.events.rounds import StepSkipped
from coordinator.rounds.admission import Admission
from coordinator.rounds.global_model import GlobalModel
from coordinator.rounds.run import Run
from coordinator.rounds.state import Phase, is_step_complete, places, wave
from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Array
from edge_sdk.protocol import residual
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import Activation, EvalResult, Gradient, TopHidden
from edge_sdk.protocol.plan import Place
from edge_sdk.protocol.roomy import RoomyCodec
from edge_sdk.runtime.interface import TailSums

TOP = "hidden states after the last block"


class WaveRunner:
    """What is computed between two aggregations, in the worker's thread."""

    def __init__(
        self,
        run: Run,
        admission: Admission,
        learned: GlobalModel,
        worker: Worker,
        handle: Callable[[Event], None],
    ) -> None:
        """Compute for *run*.

        Args:
            run: Where the run stands.
            admission: Sends to the devices.
            learned: The model whose engine computes.
            worker: Its thread.
            handle: Takes in what devices sent before its wave had its turn.
        """
        self._run, self._admission, self._learned = run, admission, learned
        self._worker, self._handle = worker, handle
        self._roomy = RoomyCodec()
        self._counted = -1, 0
        self._num_micro: Mapping[str, int] = {}

    # ---- waves ----

    def run_wave(self) -> None:
        """Run a wave whose labels are here, forward and backward."""
        state = self._run.state
        jobs = self._jobs()
        compute = partial(self._learned.engine.train, jobs, state.step, wave(state))
        self._start("wave", compute, jobs, self._answer_wave)

    def forward(self) -> None:
        """Run the forward half of a wave whose labels stay on the devices."""
        state = self._run.state
        jobs = self._jobs()
        compute = partial(self._learned.engine.forward, jobs, state.step, wave(state))
        self._start("forward", compute, jobs, self._send_final_hidden)

    def _jobs(self) -> list[Job]:
        return [self._run.inputs.jobs[place] for place in places(self._run.state)]

    def _start(
        self,
        what: str,
        compute: Callable[[], Any],
        jobs: Sequence[Job],
        then: Callable[[int, Any], None],
    ) -> None:
        """Begin a computation on what the devices of *jobs* have sent."""
        attempt = self._run.state.attempt
        devices = sorted({job.device for job in jobs})
        safely = partial(self._compute, compute, jobs)
        self._worker.start(safely, partial(then, attempt), what, devices)

    def _compute(self, compute: Callable[[], Any], jobs: Sequence[Job]) -> Any:
        """Compute; where that fails, find out whose part of it is the reason.

        Raises:
            ComputeFailed: it is one device's.
        """
        devices = sorted({job.device for job in jobs})

        def works_alone(device: str) -> bool:
            try:
                for job in jobs:
                    if job.device == device:
                        self._learned.engine.evaluate(job)
            except Exception:  # noqa: BLE001 - that one was raised is the answer
                return False
            return True

        try:
            return compute()
        except Exception as error:
            found = owned(error, devices, works_alone)
            if found is error:
                raise
            raise found from error

    def _is_over(self, attempt: int) -> bool:
        """Return whether what was computed for a wave comes too late for it."""
        return attempt != self._run.state.attempt or self._run.state.phase is not Phase.TRAINING

    def _send_final_hidden(self, attempt: int, final_hidden: dict[Place, Array]) -> None:
        if self._is_over(attempt):
            return
        self._run.take_wave(final_hidden, is_answered=False)
        for (name, micro), hidden_BTD in final_hidden.items():
            if not np.isfinite(hidden_BTD).all():
                fault = NumericError("the blocks cannot take what it sent: not finite")
                self._run.faults.accuse(name, fault)
            elif name in self._run.state.members:
                message = TopHidden(stamp=self._run.stamp(name), micro=micro)
                self._admission.send(name, message, {"hidden": self._coded(name, hidden_BTD, TOP)})

    def backward(self) -> None:
        """Run the backward half of a wave whose labels stay on the devices."""
        grads = {place: self._run.inputs.grads[place] for place in places(self._run.state)}
        compute = partial(self._go_back_from, self._run.state.step, grads, self._members_micro())
        self._start("backward", compute, self._jobs(), self._answer_wave)

    def _members_micro(self) -> Mapping[str, int]:
        """Return the micro-batches of a step of each member: one object until members change."""
        state = self._run.state
        who = state.attempt, len(state.members)  # in an attempt members only leave
        if who != self._counted:
            self._counted = who
            self._num_micro = {name: m.num_micro for name, m in state.members.items()}
        return self._num_micro

    def _go_back_from(
        self, step: int, grads: Mapping[Place, Array], num_micro: Mapping[str, int]
    ) -> list[Answer]:
        """Go back from what devices have sent, none of which counts beyond what the others had."""
        bounded = self._learned.top_gradients.bounded(step, grads, num_micro)
        return self._learned.engine.backward(bounded)

    def _answer_wave(self, attempt: int, answers: list[Answer]) -> None:
        """Send gradients first: while devices go backward, the engine updates its adapters."""
        state = self._run.state
        if self._is_over(attempt):
            return
        for answer in answers:
            if not np.isfinite(answer.grad_BTD).all():
                # Nor is the engine's own gradient: `finish_step` then keeps its adapters.
                fault = NumericError("the gradient of what it sent is not finite")
                self._run.faults.accuse(answer.device, fault)
            elif answer.device in state.members:
                with self._admission.part_of(answer.device):
                    self._answer(answer)
        if state.phase is not Phase.TRAINING:
            return
        answered = [(answer.device, answer.micro) for answer in answers]
        self._run.take_wave(answered, is_answered=True)
        if is_step_complete(state):
            self.finish_step()
        elif state.is_gathered:
            self._wave_done(attempt, True)

    def finish_step(self) -> None:
        """Update the coordinator's adapters: every device has its answers."""
        state = self._run.state
        compute = partial(self._learned.engine.finish_step, state.step)
        self._worker.start(compute, partial(self._wave_done, state.attempt), "adapters")

    def _answer(self, answer: Answer) -> None:
        message = Gradient(
            stamp=self._run.stamp(answer.device),
            micro=answer.micro,
            loss_sum=answer.sums.loss_sum if answer.sums else 0.0,
            kept=self._run.replays.take_kept(answer.device, self._run.state.step, answer.micro),
        )
        grad = {"grad": self._coded(answer.device, answer.grad_BTD, "gradients")}
        is_frozen = self._admission.plans[answer.device].is_forward_only
        self._admission.send(answer.device, message, {} if is_frozen else grad)

    def _wave_done(self, attempt: int, was_finite: bool) -> None:
        if not was_finite:
            self._run.watcher.see(StepSkipped(self._run.state.step))
        if self._is_over(attempt):
            return
        for event in self._run.finish_wave():
            self._handle(event)

    def _coded(self, device: str, array: Array, what: str) -> TensorOut:
        own = residual.WHOLE if what == TOP else residual.GRADIENT
        name = residual.plain(self._admission.codecs[device], own)
        return array, self._roomy.choose(name, array, what)

    # ---- evaluation ----

    def evaluate(self) -> None:
        """Run a micro-batch of each device that wants to have one evaluated."""
        evals = self._run.evaluations.take()
        compute = partial(self._evaluate_all, [job for _, job in evals])
        devices = sorted({job.device for _, job in evals})
        then = partial(self._answer_evals, [message for message, _ in evals])
        self._worker.start(compute, then, "evaluation", devices)

    def _evaluate_all(self, jobs: list[Job]) -> list[tuple[str, TailSums | Array | Exception]]:
        return [(job.device, self._evaluate_one(job)) for job in jobs]

    def _evaluate_one(self, job: Job) -> TailSums | Array | Exception:
        try:
            return self._learned.engine.evaluate(job)
        except Exception as error:  # noqa: BLE001 - handed on, to be the end of one device's part
            return error

    def _answer_evals(
        self, messages: list[Activation], results: list[tuple[str, TailSums | Array | Exception]]
    ) -> None:
        for message, (device, result) in zip(messages, results, strict=True):
            if not self._admission.is_known(device):
                continue  # it left while its micro-batch was evaluated
            if isinstance(result, Exception):
                with self._admission.part_of(device):
                    raise result
            elif not np.isfinite(result.loss_sum if isinstance(result, TailSums) else result).all():
                self._run.faults.accuse(
                    device, NumericError("the evaluation of what it sent is not finite")
                )
            elif isinstance(result, TailSums):
                answer = EvalResult(stamp=message.stamp, micro=message.micro, **result._asdict())
                self._admission.send(device, answer)
            else:
                top = TopHidden(stamp=message.stamp, micro=message.micro, is_eval=True)
                self._admission.send(device, top, {"hidden": self._coded(device, result, TOP)})
