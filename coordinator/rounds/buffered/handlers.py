"""Check what devices on tour send and put it where it belongs; nothing is computed here."""

from __future__ import annotations

from dataclasses import replace

from coordinator.rounds.buffered.run import BufferedRun, Visit
from coordinator.rounds.handlers import MessageHandler
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation, StepReport, TopGradient


class TourHandler(MessageHandler):
    """The receiving half of a coordinator that waits for nobody."""

    _run: BufferedRun

    def _on_activation(self, device: str, envelope: Envelope) -> None:
        """Take the input of a micro-batch, of training or of an evaluation."""
        message: Activation = envelope.message
        if message.is_eval:
            super()._on_activation(device, envelope)
            return
        state = self._run.tours
        member = state.members.get(device)
        if member is None or not self._run.is_current(message.stamp):
            return
        if member.is_local or message.num_micro != member.num_micro:
            raise RemoteProtocolError(
                f"micro-batch {message.micro} of {message.num_micro}: not the plan's"
            )
        plan = self._admission.plans[device]
        job = self._limits.job(member, plan, message, envelope.tensors)
        counts = state.take_turn(device, message.stamp.step, message.micro)
        self._targets.add(message, job)
        samples = float(len(job.lengths_B)) if counts else 0.0
        self._run.take_visit(Visit(message, replace(job, samples=samples)))

    def _on_gradient(self, device: str, envelope: Envelope) -> None:
        message: TopGradient = envelope.message
        if not self._run.is_current(message.stamp):
            return
        place = device, message.stamp.step, message.micro
        visit = self._run.inputs.hidden.get(place)
        if visit is None:
            raise RemoteProtocolError("TopGradient without TopHidden")
        grad_BTD = self._gradient(message, envelope, visit.job)
        if grad_BTD is not None:
            self._run.take_gradient_of(place, grad_BTD)

    def _check_turn(self, device: str, report: StepReport) -> None:
        """Refuse the report of a step that is not on the tour, or was reported before."""
        tour, stamp = self._run.tours.tours[device], report.stamp
        attempt, last = self._reported.get(device, (stamp.attempt, -1))
        if attempt != stamp.attempt:
            last = -1
        if not max(last + 1, tour.begin) <= stamp.step < tour.end:
            raise RemoteProtocolError(
                f"step report of step {stamp.step}, due are {max(last + 1, tour.begin)} to "
                f"{tour.end - 1}"
            )
        self._reported[device] = stamp.attempt, stamp.step
