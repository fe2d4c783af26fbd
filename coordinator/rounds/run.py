"""Where a run stands and what its devices have sent: here, and only here, `RunState` changes.

Whoever acts for the run says what has happened; what that means for the round, for what is pending
and for those who look on is known here. It knows no network, no engine and no planner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.round_start import RoundStartBuilder
from coordinator.engine.interface import Job
from coordinator.gateway.interface import Received
from coordinator.gateway.replays import Replays
from coordinator.gateway.residuals import Residuals
from coordinator.results.events.devices import DeviceJoined, DeviceLeft, DeviceStatus
from coordinator.results.events.rounds import (
    RoundHeld,
    RoundStarted,
    RunRewound,
    UploadRefused,
    WaitEnded,
    WorkDropped,
)
from coordinator.results.metrics import Reporting
from coordinator.rounds.intake.evaluations import Evaluations
from coordinator.rounds.intake.savers import Savers
from coordinator.rounds.members.selection import Selection
from coordinator.rounds.state import (
    Conduct,
    Member,
    RunState,
    drop_kept,
    drop_member,
    fit_for_round,
    give_up_round,
)
from coordinator.rounds.step.wave_choice import Rows
from edge_sdk.errors import NumericError, public_text
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    RoundStart,
    Stamp,
    StepReport,
    TopGradient,
)
from edge_sdk.protocol.plan import Place, Plan

RESTS = "sits this round out: it was lost, too late or refused, again and again"
RoundWork = Activation | TopGradient | StepReport | AdapterUpload


@dataclass
class PendingInputs:
    """What devices have sent and nobody has used yet, by device."""

    jobs: dict[Place, Job] = field(default_factory=dict)
    """Input of the current wave."""
    grads: dict[Place, Array] = field(default_factory=dict)
    """Gradients of its final hidden states."""
    early: dict[str, dict[tuple[int, int], Envelope]] = field(default_factory=dict)
    """Activations of later waves, by step and micro-batch."""
    reports: dict[str, Report] = field(default_factory=dict)
    """Uploads of the round."""

    def keep_early(self, device: str, where: tuple[int, int], envelope: Envelope) -> None:
        """Keep an activation until its wave, by step and micro-batch, has its turn."""
        self.early.setdefault(device, {})[where] = envelope

    def take_early(self, device: str, where: tuple[int, int]) -> Envelope | None:
        """Return what was kept for a micro-batch that has its turn now, if anything was."""
        return self.early.get(device, {}).pop(where, None)

    def use_up(self, places: Collection[Place]) -> None:
        """Drop the inputs of a wave, which is computed."""
        for place in places:
            self.jobs.pop(place, None)
            self.grads.pop(place, None)

    def forget(self, device: str, *, keeps_report: bool = False) -> None:
        """Drop everything from one device; its upload stays where the round goes on with that."""
        self.jobs = {place: job for place, job in self.jobs.items() if place[0] != device}
        self.grads = {place: grad for place, grad in self.grads.items() if place[0] != device}
        self.early.pop(device, None)
        if not keeps_report:
            self.reports.pop(device, None)


class Run:
    """One run between two events."""

    def __init__(
        self,
        run_id: str,
        state: RunState,
        round_start: RoundStartBuilder,
        reporting: Reporting,
        residuals: Residuals,
        replays: Replays | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.id, self.state = run_id, state
        self.selection = selection or Selection(None, 0)
        self.residuals, self.replays = residuals, replays or Replays()
        self.reporting, self.watcher = reporting, reporting.watcher
        self.must_rewind = False
        """Whether the round was given up: everything must go back to the last checkpoint."""
        self.savers, self.holding = Savers(state), Holding(self)
        self.leavers: dict[str, str] = {}
        """Why members want to leave that wait until they may."""
        self.inputs = PendingInputs()
        self.evaluations = Evaluations()
        self.conduct = Conduct()
        self.faults = Faults(self)
        self.gone: dict[str, str] = {}
        """Why devices have left, until they are back."""
        self.coming: set[str] = set()
        """Devices that are on their way to a round: greeted, and not ready yet."""
        self.may_tell: Callable[[str], bool] = lambda _device: True
        """Whether what became of a device that was never ready deserves another line."""
        self.asked: dict[str, int] = {}
        """The round at whose start a device was asked to evaluate, until it has reported."""
        self.cut_off = CutOff(self)
        self._round_start = round_start

    def stamp(self, device: str) -> Stamp:
        """Return a stamp of this moment for a message to *device*."""
        state = self.state
        return Stamp(
            run=self.id,
            device=device,
            round=state.round,
            step=state.step,
            attempt=state.attempt,
        )

    def is_current(self, stamp: Stamp) -> bool:
        """Return whether a message belongs to this attempt at this round."""
        now = self.state.round, self.state.attempt
        return stamp.run == self.id and (stamp.round, stamp.attempt) == now

    # ---- devices come and go ----

    def join(self, member: Member, num_samples: int, left_out: int = 0, cut: int = 0) -> None:
        """Take in a device that is ready; what it held of a round before is gone."""
        self.lose(member.name, "", counts=True)
        self.coming.discard(member.name)
        self.gone.pop(member.name, None)
        self.state.join(member)
        self.watcher.see(DeviceJoined(member.name, member.split, num_samples, left_out, cut))

    def lose(self, device: str, reason: str, *, counts: bool = False) -> None:
        """Let go of a device that is gone or, without a *reason*, begins anew.

        The first reason counts: that its link is closed after a goodbye or an error says nothing.

        Args:
            device: Who.
            reason: Why.
            counts: Whether its part of the round counts all the same, where that is whole.
        """
        is_kept = counts and self.savers.is_whole(device)
        (self.state.kept.add if is_kept else self.state.kept.discard)(device)
        self.leavers.pop(device, None)
        was_ready, was_coming = device in self.state.ready, device in self.coming
        is_told = was_ready or (was_coming and bool(reason) and self.may_tell(device))
        (self.coming.discard if reason else self.coming.add)(device)
        if reason:
            if was_ready or was_coming or device not in self.gone:
                self.gone[device] = public_text(reason)
            if device in self.state.members and self.state.is_in_round and not is_kept:
                self.conduct.lost(device, self.state.round)
        self.must_rewind |= self.state.leave(device)
        self._round_start.forget(device)
        self.inputs.forget(device, keeps_report=is_kept)
        self.evaluations.forget(device)
        self.replays.forget(device)
        if is_told and reason:
            self.watcher.see(DeviceLeft(device, public_text(reason)))

    def wait_for(self, device: str) -> None:
        """Let a device begin anew; the next round waits until it is ready again."""
        self.lose(device, "")
        self.state.wait_for({device})

    def stop_waiting(self, devices: Collection[str]) -> None:
        """Go on without devices that are not back yet."""
        self.watcher.see(WaitEnded(sorted(devices)))
        self.state.stop_waiting(devices)

    # ---- what they send ----

    def take_input(self, job: Job) -> None:
        """Take a member's input of the current wave."""
        self.inputs.jobs[job.place] = job
        if self.state.is_gathered:
            self.state.arrive(job.device)
        else:
            self.state.here.arrive(job.place, Rows(*job.hidden_BTD.shape[:2]))

    def take_gradient(self, place: Place, grad: Array) -> None:
        """Take the gradient of a member's final hidden states."""
        self.inputs.grads[place] = grad
        if self.state.is_gathered:
            self.state.arrive(place[0])
        else:
            self.state.here.come_back(place)

    def take_step(self, device: str, report: StepReport) -> None:
        """Take a member's report of a step."""
        self.state.report_step()
        self.reporting.step(device, report, self.state.end_step)

    def take_upload(self, device: str, report: Report) -> None:
        """Take what a member has learned in the round."""
        self.inputs.reports[device] = report
        self.state.upload(device)
        self.conduct.finished(device)

    def take_evaluation(self, device: str, report: EvalReport) -> None:
        """Take what a device has found on its own validation data."""
        if report.stamp.round == self.state.round:
            self.reporting.evaluation(device, report)
            self.reporting.flush_if_complete(self.state.members)
        self.state.report_eval(device)
        self.evaluations.end(device)

    # ---- waves ----

    def take_wave(self, places: Collection[Place], *, is_answered: bool) -> None:
        """Note that a wave has gone forward, and awaits the members' gradients, or is answered."""
        state = self.state
        if is_answered:
            self.inputs.use_up(places)
        if state.is_gathered and not is_answered:
            state.finish_forward()
        elif not is_answered:
            state.here.send_away(places)
        elif not state.is_gathered:
            state.here.answer(places, is_new_wave=not state.labels_on_device)

    def finish_wave(self) -> list[Received]:
        """Go on to the next wave or, where waves are not gathered, to the next step.

        Returns:
            What has been kept for later.
        """
        self.state.finish_wave()
        early, self.inputs.early = self.inputs.early, {}
        return [
            Received(name, envelopes[where])
            for name, envelopes in early.items()
            for where in sorted(envelopes)
        ]

    # ---- rounds ----

    @property
    def total_rounds(self) -> int:
        """Rounds after which the run is over; the last one may be the one that goes on."""
        return self.state.total_rounds

    @total_rounds.setter
    def total_rounds(self, rounds: int) -> None:
        self.state.total_rounds = rounds

    def start_round(self) -> list[str]:
        """Begin a round with all that are ready, or those that are drawn; return who is not."""
        state = self.state
        resting = self.conduct.resting(state.ready, state.round)
        fit = fit_for_round(state, resting)
        state.start_round(self.selection.draw(state.round, state.ready, fit))
        for device in sorted(resting - set(fit)):
            self.watcher.see(DeviceStatus(device, RESTS, is_delay=True))
        self.inputs = PendingInputs()
        self.residuals.begin_round(self.state.round)
        self.cut_off.begin_round()
        self.reporting.begin_round()
        boards, waiting = self.reporting.boards(), sorted(set(fit) - state.members.keys())
        started = RoundStarted(state.round, state.attempt, sorted(state.members), boards, waiting)
        self.watcher.see(started)
        return waiting

    def round_start(
        self, stamp: Stamp, end_step: int, plan: Plan, held: Iterable[int], *, evaluate: bool
    ) -> tuple[RoundStart, Mapping[str, TensorOut]]:
        """Return the message that lets a device begin a round, with its tensors.

        Args:
            stamp: Whom it is for, and the step at which the round begins.
            end_step: First step after the round.
            plan: What the device runs.
            held: Steps of which it has a checkpoint.
            evaluate: Whether it is to evaluate first, where it has not done so already.
        """
        state, row = self.state, self.reporting.pending
        own = tuple(step for step in held if state.first_step <= step <= state.end_step)
        has_evaluated = row is None or stamp.device in row.get("eval_by_device", {})
        start, tensors = self._round_start.message(
            stamp, end_step, plan, own, evaluate=evaluate and not has_evaluated
        )
        if start.evaluate:
            self.asked[stamp.device] = stamp.round
            self.evaluations.begin(stamp.device)
            if stamp.device in state.members:
                state.evaluating.add(stamp.device)
        self.replays.begin(start, tensors)
        if start.restore_step < 0:
            state.begin_at(stamp.device, stamp.step)
        return start, tensors

    def finish_round(self, result: RoundResult, *, evaluating: bool) -> None:
        """Take note that the round is aggregated; members may have yet to report on it."""
        members = set(self.state.members)
        self.faults.num_rewinds = 0
        for device in members:
            self.conduct.accepted(device)
        self.selection.ended(members)
        members -= self.state.kept
        self._round_start.round_ended(result, members)
        self.reporting.telemetry(self.state.round, self.cut_off.take_late())
        self.state.finish_round(evaluating=members if evaluating else set())
        self.inputs.reports = {}

    def hand_out(self) -> list[str]:
        """Return the devices that are to evaluate the last aggregation."""
        self.state.hand_out()
        return list(self.state.awaiting_eval)

    # ---- checkpoints ----

    def facts(self) -> dict[str, Any]:
        """Return where the run stands, for a checkpoint; steps are whole."""
        return {
            "run": self.id,
            "round": self.state.round,
            "step": self.state.step,
            "attempt": self.state.attempt,
            "devices": sorted(self._awaited()),
            "selection": self.selection.facts(),
            "begins": self.state.begins,
            "unevaluated": sorted(self.state.awaiting_eval),
            "row": self.reporting.pending,
            "progress": self.reporting.progress(),
            "costs": self.reporting.costs(),
        }

    def _awaited(self) -> set[str]:
        """Return for whom a round of a run that is resumed waits: all of whom it was drawn."""
        drawn = self.state.ready.keys() if self.state.per_round is not None else ()
        return {*self.state.members, *self._round_start.current, *drawn}

    def saved(self) -> None:
        """Note a checkpoint of this step, to which a rewind goes back from now on."""
        self.state.saved()

    def restore(self, facts: Mapping[str, Any], *, in_new_process: bool) -> None:
        """Go back to where `facts` found the run; in a new process, wait for its devices."""
        self.state.restore(facts["round"], facts["step"], facts["attempt"], facts["begins"])
        self._round_start.forget()
        self.selection.load_facts(facts.get("selection", {}))
        self.reporting.load_progress(facts["progress"])
        self.inputs, self.evaluations = PendingInputs(), Evaluations()
        self.must_rewind = self.holding.is_held = False
        if in_new_process:
            self.reporting.load_costs(facts.get("costs", {}))  # older checkpoints have none
            self.reporting.restore_row(facts["row"])
            evaluated = set((facts["row"] or {}).get("eval_by_device", {}))
            self.state.wait_for(facts["devices"], set(facts["unevaluated"]) - evaluated)


class CutOff:
    """Members that a round has gone on without, because they were too late, and what they send."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.devices: set[str] = set()
        """Of this round, or of the one before while the next has not begun."""
        self._late: dict[str, int] = {}
        """Messages that came too late for their round, by device that was cut off in one."""

    def begin_round(self) -> None:
        """Let everybody take part again."""
        self.devices = set()

    def add(self, devices: Collection[str]) -> None:
        """Let the round go on without *devices*, which stay ready for the next one."""
        run = self._run
        for device in sorted(devices):
            drop_member(run.state, device)
            run.inputs.forget(device)
            run.evaluations.forget(device)
            run.conduct.lost(device, run.state.round)
            self._late.setdefault(device, 0)
        self.devices |= set(devices)

    def drop(self, device: str, message: RoundWork) -> bool:
        """Count a message that is of no use any more; return whether it is such a one."""
        run = self._run
        is_due = device in run.state.members and run.is_current(message.stamp)
        if device not in self._late or is_due:
            return False
        self._late[device] += 1
        if isinstance(message, AdapterUpload):
            run.watcher.see(WorkDropped(message.stamp.round, device))
        return True

    def take_late(self) -> dict[str, int]:
        """Return how many messages came too late since the last call, where there were any."""
        late = {device: number for device, number in self._late.items() if number}
        self._late = dict.fromkeys(self._late, 0)
        return late


class Holding:
    """Rounds that are saved on their way: they go on, or wait for those who have left."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.is_held = False
        """Whether the round that is given up waits where it is saved, for those who have left."""

    def go_on(self) -> None:
        """Go on with the round, whether it is saved or not; who has left meanwhile is no member."""
        self._run.savers.is_asked = False
        self._run.must_rewind |= drop_kept(self._run.state)

    def hold(self, leavers: Mapping[str, str]) -> None:
        """Let *leavers* go, as the round is saved; it goes on from there when they are back."""
        state = self._run.state
        here = state.ready.keys() - (leavers.keys() & self._run.leavers.keys())
        away = state.members.keys() - here
        held = RoundHeld(state.round, state.step, sorted(away))
        self.let_go(leavers)
        self.is_held = bool(away)
        if away:
            self._run.watcher.see(held)
        state.wait_for(away)

    def let_go(self, leavers: Mapping[str, str]) -> None:
        """Give the round up, as *leavers* go for whom it was to be saved."""
        run = self._run
        give_up_round(run.state)
        run.savers.is_asked, run.must_rewind = False, True
        for device, reason in leavers.items():
            if device in run.leavers:  # else it has left, and may be back
                run.lose(device, reason)


class Faults:
    """Of whose part nothing good has come, and what becomes of it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.num_rewinds = 0
        """Times in a row that the round has led to nothing good, through no device's fault."""
        self.accused: dict[str, NumericError] = {}
        """Devices of whose part nothing finite has come; whose fault that is has yet to be seen."""

    def accuse(self, device: str, error: NumericError) -> None:
        """Note that nothing finite has come of a device's part; the first reason counts."""
        self.accused.setdefault(device, error)

    def take_accused(self) -> dict[str, NumericError]:
        """Return who is accused, and of what; nobody is any more."""
        accused, self.accused = self.accused, {}
        return accused

    def set_aside(self, device: str, reason: str) -> None:
        """Leave what a device has uploaded out of the round, which goes on; it stays ready."""
        run = self._run
        run.watcher.see(UploadRefused(run.state.round, device, public_text(reason)))
        drop_member(run.state, device)
        run.inputs.forget(device)
        run._round_start.forget(device)
        run.conduct.refused(device, run.state.round)

    def give_up_round(self, reason: str) -> None:
        """Go back to the last good state, whoever was the reason: nobody is blamed."""
        run = self._run
        self.num_rewinds += 1
        run.watcher.see(RunRewound(run.state.round, public_text(reason)))
        give_up_round(run.state)
        run.must_rewind = True
