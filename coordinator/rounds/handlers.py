"""Check what devices send and put it where it belongs; nothing is computed or decided here."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.aggregation.ledger import Report
from coordinator.engine.interface import Job
from coordinator.gateway.interface import (
    Event,
    Joined,
    Left,
    Received,
    Registered,
    Rejected,
    Silent,
)
from coordinator.gateway.link_probe import Probing
from coordinator.results.events.devices import DeviceEnrolled, DeviceStatus, MessageRejected
from coordinator.rounds.admission import Admission
from coordinator.rounds.device_states import DeviceState, action_on
from coordinator.rounds.global_model import GlobalModel
from coordinator.rounds.plans.changes import PlanChanges
from coordinator.rounds.run import RoundWork, Run
from coordinator.rounds.state import awaits_gradient, has_steps_done, judge, wave
from coordinator.rounds.step.open_step import Arrival
from coordinator.rounds.validation import (
    TargetCount,
    WaveInput,
    check_evaluation,
    check_gradient,
    check_importance,
    check_ready,
    check_report,
    check_upload,
)
from edge_sdk.client.states import MessageAction
from edge_sdk.errors import NumericError, RemoteProtocolError, public_text
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    Failure,
    Goodbye,
    Hello,
    Paused,
    Probe,
    Profiled,
    Ready,
    Resend,
    StepReport,
    TopGradient,
)
from edge_sdk.transport.keys import fingerprint

# Of a device whose program, or link, ended without a goodbye.
SILENT_END = "its program ended without saying why"


class MessageHandler:
    """The receiving half of the coordinator."""

    def __init__(
        self,
        run: Run,
        admission: Admission,
        changes: PlanChanges,
        learned: GlobalModel,
        limits: WaveInput,
        probing: Probing,
    ) -> None:
        self._run, self._admission, self._changes = run, admission, changes
        self._learned, self._limits, self._probing = learned, limits, probing
        self._targets = TargetCount()
        self._reported: dict[str, tuple[int, int]] = {}
        """Attempt and step of the last report of a step, by device."""
        self._handlers: dict[type, Callable[[str, Envelope], None]] = {
            Hello: self._on_hello,
            Ready: self._on_ready,
            Activation: self._on_activation,
            TopGradient: self._on_gradient,
            StepReport: self._on_step,
            AdapterUpload: self._on_upload,
            EvalReport: self._on_eval_report,
            Paused: self._on_paused,
            Probe: probing.answer,
            Goodbye: self._on_goodbye,
            Profiled: lambda d, e: changes.profiled(d, e.message.profile),
            Failure: lambda d, e: changes.failed(d, e.message),
        }

    def add(self, kind: type, handler: Callable[[str, Envelope], None]) -> None:
        """Let *handler* take the messages of a kind."""
        self._handlers[kind] = handler

    def handle(self, event: Event) -> None:
        """Take an event in; what goes wrong ends the part of its device and nothing else.

        Raises:
            EdgeError: trouble of our own, as are OSError and MemoryError.
        """
        with self._admission.part_of(event.device):
            self._take(event)

    def _take(self, event: Event) -> None:
        device = event.device
        if isinstance(event, Received):
            if device not in self._admission.leaving and device not in self._run.faults.accused:
                self._receive(device, event.envelope)
        elif isinstance(event, Joined):
            self._admission.forget(device)
        elif isinstance(event, Left):
            self._run.lose(device, event.reason or SILENT_END, counts=not event.reason)
            self._admission.forget(device)
        elif isinstance(event, Silent):
            self._admission.silent(device, event.seconds)
        elif isinstance(event, Registered):
            key, address = fingerprint(event.key), event.address
            self._run.watcher.see(DeviceEnrolled(device, key, address))
        elif isinstance(event, Rejected):
            error = public_text(event.error)
            if self._admission.allowance.may_tell(device):
                self._run.watcher.see(MessageRejected(device, error))
            if self._admission.is_here(device):
                raise RemoteProtocolError(error)

    def _receive(self, device: str, envelope: Envelope) -> None:
        message = envelope.message
        self._admission.allowance.take(device, message)
        if isinstance(message, RoundWork) and self._run.cut_off.drop(device, message):
            return
        if action_on(self._state_of(device), message) is MessageAction.TAKE:
            self._handlers[type(message)](device, envelope)

    def _state_of(self, device: str) -> DeviceState:
        state, admission = self._run.state, self._admission
        if device in state.ready:
            return DeviceState.MEMBER if device in state.members else DeviceState.READY
        if not admission.is_known(device):
            return DeviceState.UNKNOWN
        return DeviceState.ASSIGNED if device in admission.plans else DeviceState.WELCOMED

    def _on_paused(self, device: str, envelope: Envelope) -> None:
        if self._run.is_current(envelope.message.stamp):
            self._run.savers.take(device, envelope.message.stamp.step)

    def _on_goodbye(self, device: str, envelope: Envelope) -> None:
        message: Goodbye = envelope.message
        if not message.stays:
            self._run.lose(device, message.reason, counts=True)
        elif device in self._run.state.ready:
            self._run.leavers[device] = message.reason

    def _on_hello(self, device: str, envelope: Envelope) -> None:
        self._run.lose(device, "", counts=True)
        self._admission.greet(device, envelope.message)
        self._probing.begin(device)
        doing = "fetching its blocks" if device in self._admission.plans else "measuring itself"
        self._run.watcher.see(DeviceStatus(device, doing))

    def _on_ready(self, device: str, envelope: Envelope) -> None:
        ready: Ready = envelope.message
        check_ready(ready)
        member = self._admission.admit(device, ready)
        self._run.join(member, ready.num_samples, ready.left_out, ready.cut)

    def _on_activation(self, device: str, envelope: Envelope) -> None:
        """Take the input of a wave, of a later wave, or of an evaluation."""
        message: Activation = envelope.message
        plan, member = self._admission.plans[device], self._run.state.members.get(device)
        if message.is_eval:
            due = self._run.evaluations
            if not due.is_due(device) or not self._run.is_current(message.stamp):
                return
            job = self._limits.job(self._run.state.ready[device], plan, message, envelope.tensors)
            due.add(message, job)
            return
        if member is None or not self._run.is_current(message.stamp):
            return
        if member.is_local or message.num_micro != member.num_micro:
            raise RemoteProtocolError(
                f"micro-batch {message.micro} of {message.num_micro}: not the plan's"
            )
        whole = self._run.residuals.read(device, envelope, self._admission.codecs[device])
        if whole is None:
            self._admission.send(device, Resend(stamp=message.stamp, micro=message.micro))
            return
        envelope = whole
        message = envelope.message
        where, state = (message.stamp.step, message.micro), self._run.state
        arrival = judge(state, device, *where)
        if arrival is Arrival.NOW:
            tensors = self._run.replays.whole(device, envelope).tensors
            job = self._limits.job(member, plan, message, tensors)
            self._run.replays.keep(device, message, tensors, plan)
            self._targets.add(message, job)
            self._run.take_input(job)
            following = (message.stamp.step, message.micro + 1)
            kept = None if state.is_gathered else self._run.inputs.take_early(device, following)
            if kept is not None:
                self._on_activation(device, kept)
        elif arrival is Arrival.LATER:
            self._run.inputs.keep_early(device, where, envelope)
        elif arrival is Arrival.BEYOND:
            raise RemoteProtocolError(
                f"step {where[0]}.{where[1]} while the others are at {state.step}.{wave(state)}"
            )

    def _on_gradient(self, device: str, envelope: Envelope) -> None:
        message, state = envelope.message, self._run.state
        if not self._run.is_current(message.stamp) or message.stamp.step != state.step:
            return
        place = device, message.micro
        is_due = awaits_gradient(state, place)
        if is_due is None:
            return
        if not is_due or place not in self._run.inputs.jobs:
            raise RemoteProtocolError("TopGradient without TopHidden")
        grad = self._gradient(message, envelope, self._run.inputs.jobs[place])
        if grad is not None:
            self._run.take_gradient(place, grad)

    def _gradient(self, message: TopGradient, envelope: Envelope, job: Job) -> Array | None:
        """Return a gradient; None where it is not finite, for which we may be the reason.

        A hidden state that is not finite is sent by no honest device: it says Failure.
        """
        try:
            return check_gradient(message, envelope.tensors, job)
        except NumericError as error:
            self._run.faults.accuse(job.device, error)
            return None

    def _on_step(self, device: str, envelope: Envelope) -> None:
        report: StepReport = envelope.message
        if self._run.is_current(report.stamp):
            plan = self._admission.plans[device]
            check_report(report, self._limits.most_tokens(plan), plan.batch_size)
            self._targets.check(device, report)
            self._check_turn(device, report)
            if not self._run.replays.has_replayed(device, report.stamp.step):
                self._changes.stepped(device, report.num_tokens, report.compute_s)
            self._run.take_step(device, report)

    def _check_turn(self, device: str, report: StepReport) -> None:
        """Refuse the report of a step that is not in the round, or was reported before."""
        stamp, state = report.stamp, self._run.state
        attempt, last = self._reported.get(device, (stamp.attempt, -1))
        if attempt != stamp.attempt:
            last = -1
        if not max(last + 1, state.first_step) <= stamp.step < state.end_step:
            raise RemoteProtocolError(
                f"step report of step {stamp.step}, due are those of this round after {last}"
            )
        self._reported[device] = stamp.attempt, stamp.step

    def _on_upload(self, device: str, envelope: Envelope) -> None:
        message: AdapterUpload = envelope.message
        if not self._run.is_current(message.stamp):
            return
        plan, tensors = self._admission.plans[device], envelope.tensors
        shapes, head = self._learned.upload_shapes(plan)
        most, state = self._learned.screening.most_number(message.stamp.round), self._run.state
        check_upload(message, tensors, shapes, most, is_due=has_steps_done(state, device))
        check_importance(plan, message.importance)
        report = Report(
            split=plan.split,
            num_samples=plan.batch_size * state.num_steps(device),
            pairs=self._learned.uploaded(device, plan, tensors),
            head={name: tensors[name] for name in head},
            importance=message.importance,
        )
        self._run.take_upload(device, report)
        self._probing.begin(device)

    def _on_eval_report(self, device: str, envelope: Envelope) -> None:
        report: EvalReport = envelope.message
        check_evaluation(report)
        if self._run.asked.get(device) == report.stamp.round:  # of the others, nothing is wanted
            del self._run.asked[device]
            self._run.take_evaluation(device, report)
