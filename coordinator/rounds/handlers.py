"""What devices send is checked and put where it belongs; nothing is computed or decided here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from coordinator.aggregation.ledger import Report
from coordinator.gateway.interface import Event, Left, Received, Rejected, Silent
from coordinator.gateway.link_probe import Probing
from coordinator.results.events import DeviceJoined, DeviceStatus, MessageRejected, PlanMade
from coordinator.rounds.run import Run
from coordinator.rounds.validation import (
    WaveInput,
    check_evaluation,
    check_gradient,
    check_importance,
    check_report,
    check_upload,
)
from edge_sdk.errors import EdgeError, OutOfMemory, PeerGone, RefusedError, RemoteProtocolError
from edge_sdk.lora.adapters import Pair
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    Failure,
    Goodbye,
    Hello,
    PartRequest,
    Paused,
    Probe,
    Profiled,
    Ready,
    StepReport,
    TopGradient,
)

log = logging.getLogger(__name__)


class MessageHandler:
    """The receiving half of the coordinator."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.paused: set[str] = set()
        """Devices that have saved their state."""
        self._probing = Probing(run.gateway)
        self._input = WaveInput(
            run.model.text_config.hidden_size,
            run.model.text_config.vocab_size,
            len(run.config.label_names),
            run.model.max_length,
            run.config.labels,
        )

    def handle(self, event: Event) -> None:
        """Take an event in; a mistake of one device ends its own part and nothing else."""
        device = event.device
        try:
            if isinstance(event, Received):
                self._receive(device, event.envelope)
            elif isinstance(event, Left):
                self.run.lose(device, event.reason or "left")
            elif isinstance(event, Silent) and event.seconds >= self.run.config.patience_s:
                self.run.lose(device, f"silent for {event.seconds:.0f} s")
            elif isinstance(event, Rejected):
                self.run.watcher.see(MessageRejected(device, event.error))
                if device in self.run.gateway.devices():
                    raise RemoteProtocolError(event.error)
        except PeerGone as gone:
            self.run.lose(device, str(gone))
        except EdgeError as error:
            self.expel(device, error)

    def _receive(self, device: str, envelope: Envelope) -> None:
        message = envelope.message
        handlers: dict[type, Callable[[str, Envelope], None]] = {
            Hello: self._on_hello,
            PartRequest: lambda d, e: self.run.admission.send_part(d, e.message),
            Ready: self._on_ready,
            Activation: self.activation,
            TopGradient: self._on_gradient,
            StepReport: self._on_step,
            AdapterUpload: self._on_upload,
            EvalReport: self._on_eval_report,
            Paused: self._on_paused,
            Probe: self._probing.answer,
            Goodbye: lambda d, e: self.run.lose(d, e.message.reason),
            Profiled: self._on_profiled,
            Failure: self._on_failure,
        }
        handlers[type(message)](device, envelope)

    def _on_hello(self, device: str, envelope: Envelope) -> None:
        self.run.lose(device, "")
        self.run.admission.greet(device, envelope.message)
        self._probing.begin(device)
        self.run.watcher.see(DeviceStatus(device, "fetching its blocks"))

    def _on_profiled(self, device: str, envelope: Envelope) -> None:
        """Plan for the device at once, or with the others once enough of them are here."""
        run, admission = self.run, self.run.admission
        if device not in admission.codecs:
            raise RemoteProtocolError("Profiled before Hello")
        run.planner.profiled(device, envelope.message.profile)
        if device in run.state.ready:  # it has changed; what that means is decided between rounds
            run.watcher.see(DeviceStatus(device, "reports another speed"))
            return
        run.watcher.see(DeviceStatus(device, "has told what it offers"))
        if admission.assign(device) or run.planner.plans is not None:
            return
        waiting = [d for d in run.gateway.devices() if run.planner.is_known(d)]
        if len(waiting) >= run.config.min_devices:
            self._first_plans(waiting)

    def _first_plans(self, devices: list[str]) -> None:
        found = self.run.planner.begin(devices)
        self.run.watcher.see(PlanMade(self.run.state.round, found, ["first plans"], {}))
        for name in devices:
            if name in found.refused:
                self.expel(name, RefusedError(found.refused[name]))
            else:
                self.run.admission.assign(name)

    def move(self, device: str) -> None:
        """Let a device run its new plan; the next round waits until it is ready again."""
        run = self.run
        try:
            run.lose(device, "")
            run.admission.held_steps[device] = ()
            run.state.awaited.add(device)
            run.admission.assign(device)
            run.watcher.see(DeviceStatus(device, "has a new plan"))
        except PeerGone as gone:
            run.lose(device, str(gone))
        except EdgeError as error:
            self.expel(device, error)

    def move_outdated(self) -> None:
        """Give devices the planner's plan where they run another one, as after a rewind."""
        run = self.run
        for device in sorted(run.state.ready):
            try:
                is_outdated = run.planner.plan(device) != run.admission.plans[device]
            except EdgeError as error:
                self.expel(device, error)
                continue
            if is_outdated:
                self.move(device)

    def assign_waiting(self) -> None:
        """Send their plans to devices whose graphs are there by now."""
        for device in sorted(self.run.admission.waiting):
            try:
                self.run.admission.assign(device)
            except PeerGone as gone:
                self.run.lose(device, str(gone))
            except EdgeError as error:
                self.expel(device, error)

    def _on_failure(self, device: str, envelope: Envelope) -> None:
        message: Failure = envelope.message
        if message.error == OutOfMemory.__name__:
            self.run.planner.ran_out_of_memory(device)
        self.run.lose(device, f"{message.error}: {message.text}")

    def _on_ready(self, device: str, envelope: Envelope) -> None:
        member = self.run.admission.admit(device, envelope.message)
        self.run.lose(device, "")  # ready once more: what it held of a round is gone
        self.run.state.join(member)
        self.run.watcher.see(DeviceJoined(device, member.split, envelope.message.num_samples))

    def activation(self, device: str, envelope: Envelope) -> None:
        """Take the input of a wave, of a later wave, or of an evaluation."""
        message: Activation = envelope.message
        ready = self.run.state.ready.get(device)
        if ready is None:
            raise RemoteProtocolError("Activation before Ready")
        plan, member = self.run.admission.plans[device], self.run.state.members.get(device)
        if message.is_eval:
            job = self._input.job(ready, plan, message, envelope.tensors)
            self.run.inputs.evals.append((message, job))
            return
        if member is None or not self._is_current(message):
            return
        if member.is_local or message.num_micro != member.num_micro:
            raise RemoteProtocolError(
                f"micro-batch {message.micro} of {message.num_micro}: not the plan's"
            )
        where, state = (message.stamp.step, message.micro), self.run.state
        if where == (state.step, state.micro):
            if device not in state.arrived and not state.is_forward_done:
                job = self._input.job(member, plan, message, envelope.tensors)
                self.run.inputs.jobs[device] = job
                state.arrive(device)
        elif where in state.soon():
            self.run.inputs.early.setdefault(device, {})[where] = envelope
        elif where > (state.step, state.micro):
            raise RemoteProtocolError(
                f"step {where[0]}.{where[1]} while the others are at {state.step}.{state.micro}"
            )

    def _is_current(self, message: Any) -> bool:
        stamp = message.stamp
        return (stamp.run, stamp.round, stamp.attempt) == (
            self.run.id,
            self.run.state.round,
            self.run.state.attempt,
        )

    def _on_gradient(self, device: str, envelope: Envelope) -> None:
        message, state = envelope.message, self.run.state
        is_due = (message.stamp.step, message.micro) == (state.step, state.micro)
        if device not in state.members or not self._is_current(message) or not is_due:
            return
        if not state.is_forward_done or device not in self.run.inputs.jobs:
            raise RemoteProtocolError("TopGradient without TopHidden")
        job = self.run.inputs.jobs[device]
        self.run.inputs.grads[device] = check_gradient(message, envelope.tensors, job)
        state.arrive(device)

    def _on_step(self, device: str, envelope: Envelope) -> None:
        if device in self.run.state.members and self._is_current(envelope.message):
            report: StepReport = envelope.message
            check_report(report)
            self.run.planner.stepped(device, report.num_tokens, report.compute_s)
            self.run.state.report_step()
            self.run.reporting.step(device, envelope.message, self.run.state.end_step)

    def _on_upload(self, device: str, envelope: Envelope) -> None:
        if device not in self.run.state.members or not self._is_current(envelope.message):
            return
        plan, tensors = self.run.admission.plans[device], envelope.tensors
        shapes = self._upload_shapes(plan.ranks, tail=plan.tail)
        check_upload(envelope.message, tensors, shapes)
        check_importance(plan, envelope.message.importance)
        self.run.inputs.reports[device] = Report(
            split=plan.split,
            num_samples=plan.batch_size * self.run.state.num_steps(device),
            pairs={
                n: Pair(tensors[f"{n}.A"], tensors[f"{n}.B"]) for n, r in plan.ranks.items() if r
            },
            head={n: tensors[n] for n in self.run.engine.head_shapes() if plan.tail},
            importance=envelope.message.importance,
        )
        self.run.state.upload(device)
        self._probing.begin(device)

    def _upload_shapes(self, ranks: dict[str, int], *, tail: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = dict(self.run.engine.head_shapes()) if tail else {}
        for name, rank in ranks.items():
            if not rank:
                continue
            size = self.run.model.facts.targets[name]
            shapes[f"{name}.A"] = (rank, size.num_inputs)
            shapes[f"{name}.B"] = (size.num_outputs, rank)
        return shapes

    def _on_eval_report(self, device: str, envelope: Envelope) -> None:
        report: EvalReport = envelope.message
        check_evaluation(report)
        if report.stamp.round == self.run.state.round:
            self.run.reporting.evaluation(device, report)
            self.run.reporting.flush_if_complete(self.run.state.members)
        self.run.state.report_eval(device)

    def _on_paused(self, device: str, _envelope: Envelope) -> None:
        self.paused.add(device)

    def expel(self, device: str, error: EdgeError) -> None:
        """End the part of a device that did what it must not, and tell it; the others go on."""
        self.run.lose(device, f"{type(error).__name__}: {error}")
        try:
            self.run.admission.refuse(device, error)
        except PeerGone:
            log.debug("device.gone device=%s", device)
