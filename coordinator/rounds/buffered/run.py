"""A run without a barrier, and what its devices have sent: its `BufferedState` changes here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.versions import VersionedStart
from coordinator.engine.interface import Job
from coordinator.gateway.replays import Replays
from coordinator.gateway.residuals import Residuals
from coordinator.results.events.rounds import RoundStarted, WorkDropped
from coordinator.results.events.tours import TourBegun, ToursMerged
from coordinator.results.metrics import Reporting
from coordinator.rounds.buffered.tours import BufferedState
from coordinator.rounds.run import PendingInputs, Run
from coordinator.rounds.state import Phase
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import Activation, RoundStart, Stamp
from edge_sdk.protocol.plan import Plan


@dataclass(frozen=True, eq=False)
class Visit:
    """A micro-batch of a device that is to go through the coordinator's blocks."""

    message: Activation
    job: Job
    grad: Array | None = None
    """Gradient of its final hidden state, where the device has the labels and that is here."""

    @property
    def counts(self) -> bool:
        """Whether the coordinator's blocks learn from it."""
        return self.job.samples != 0.0

    @property
    def where(self) -> tuple[int, int]:
        """Step and micro-batch."""
        return self.message.stamp.step, self.message.micro


@dataclass(frozen=True)
class Upload:
    """What a device has brought at the end of a tour."""

    device: str
    version: int
    """Merges that were done when the tour began."""
    report: Report


@dataclass
class Visits(PendingInputs):
    """What devices have sent and nobody has used yet, whatever step of theirs it is of."""

    due: deque[Visit] = field(default_factory=deque)
    """In the order in which they came."""
    hidden: dict[tuple[str, int, int], Visit] = field(default_factory=dict)
    """Whose top gradient is due, by device, step and micro-batch."""
    uploads: deque[Upload] = field(default_factory=deque)
    """What is to be put into the buffer."""

    def next_visit(self) -> Visit | None:
        """Take out the micro-batch that came first and can go on; None where there is none.

        A device goes on with one micro-batch only when it is done with the one before.
        """
        first: dict[str, tuple[int, int]] = {}
        for visit in (*self.due, *self.hidden.values()):
            device = visit.job.device
            first[device] = min(first.get(device, visit.where), visit.where)
        for visit in self.due:
            if visit.where == first[visit.job.device]:
                self.due.remove(visit)
                return visit
        return None

    def forget(self, device: str, *, keeps_report: bool = False) -> None:
        """Drop everything from one device but what it has uploaded, which is whole."""
        super().forget(device, keeps_report=keeps_report)
        self.due = deque(visit for visit in self.due if visit.job.device != device)
        self.hidden = {place: v for place, v in self.hidden.items() if place[0] != device}


class BufferedRun(Run):
    """One run between two events."""

    def __init__(
        self,
        run_id: str,
        state: BufferedState,
        starts: VersionedStart,
        reporting: Reporting,
        residuals: Residuals,
        replays: Replays,
    ) -> None:
        super().__init__(run_id, state, starts, reporting, residuals, replays)
        self.tours, self._starts = state, starts
        self.inputs: Visits = Visits()
        self.savers.are_apart = True

    def stamp(self, device: str) -> Stamp:
        """Return the stamp of a device's tour; of this moment, where it is on none."""
        tour = self.tours.tours.get(device)
        if tour is None or device not in self.tours.members:
            return super().stamp(device)
        return self._stamp_of(device)

    def _stamp_of(self, device: str) -> Stamp:
        tour = self.tours.tours[device]
        return Stamp(
            run=self.id,
            device=device,
            round=tour.version,
            step=tour.step,
            attempt=tour.attempt,
        )

    def is_current(self, stamp: Stamp) -> bool:
        """Return whether a message belongs to what its device is to do now."""
        now = self.stamp(stamp.device)
        return (stamp.run, stamp.round, stamp.attempt) == (now.run, now.round, now.attempt)

    # ---- tours ----

    def begin(self) -> None:
        """Let all that are ready begin; from now on nobody waits for anybody."""
        state = self.tours
        state.start_round()
        self.reporting.begin_round()
        boards = self.reporting.boards()
        self.watcher.see(RoundStarted(state.round, state.attempt, sorted(state.ready), boards))

    def begin_tour(
        self, device: str, plan: Plan, held: Iterable[int], *, evaluate: bool
    ) -> tuple[RoundStart, Mapping[str, TensorOut]]:
        """Return the message by which a ready device begins or goes on, with its tensors.

        Args:
            device: Who.
            plan: What it runs.
            held: Steps of which it has a checkpoint of its own.
            evaluate: Whether it is to evaluate first, where it has not done so already.
        """
        state = self.tours
        goes_on = state.begin_tour(device, held)
        tour = state.tours[device]
        stamp = self._stamp_of(device)
        schedule_step = tour.version * state.steps_per_round + tour.step - tour.begin
        self.watcher.see(TourBegun(device, tour.version, tour.step, tour.end))
        is_newest = (tour.version, tour.step) == (state.round, tour.begin)
        evaluate = evaluate and is_newest and self._has_yet_to_evaluate(device)
        if evaluate:
            self.evaluations.begin(device)
            self.asked[device] = tour.version
        if goes_on:
            self._starts.holds(device, tour.version)
            start = RoundStart(
                stamp=stamp,
                end_step=tour.end,
                is_full=False,
                restore_step=tour.step,
                schedule_step=schedule_step,
                evaluate=evaluate,
            )
            return start, {}
        return self._starts.begin(stamp, tour.end, plan, schedule_step, evaluate=evaluate)

    def _has_yet_to_evaluate(self, device: str) -> bool:
        row = self.reporting.pending
        return row is not None and device not in row.get("eval_by_device", {})

    def round_start(
        self, stamp: Stamp, end_step: int, plan: Plan, held: Iterable[int], *, evaluate: bool
    ) -> tuple[RoundStart, Mapping[str, TensorOut]]:
        """Return the message that hands the last version out, to be evaluated."""
        evaluate = evaluate and self._has_yet_to_evaluate(stamp.device)
        if evaluate:
            self.evaluations.begin(stamp.device)
            self.asked[stamp.device] = stamp.round
        return self._starts.begin(stamp, end_step, plan, -1, evaluate=evaluate)

    def take_upload(self, device: str, report: Report) -> None:
        """Take what a device has learned on its tour."""
        tour = self.tours.end_tour(device)
        self.inputs.uploads.append(Upload(device, tour.version, report))
        self.conduct.finished(device)

    def take_visit(self, visit: Visit) -> None:
        """Let a micro-batch wait for the coordinator."""
        self.inputs.due.append(visit)

    def await_gradient(self, visit: Visit) -> None:
        """Note that the device has the final hidden state of a micro-batch, and is to go on."""
        device = visit.job.device
        tour = self.tours.tours[device]
        tour.inputs, tour.hidden = tour.inputs - 1, tour.hidden + 1
        self.inputs.hidden[(device, *visit.where)] = visit

    def take_gradient_of(self, place: tuple[str, int, int], grad_BTD: Array) -> None:
        """Let a micro-batch wait for its way back through the coordinator's blocks."""
        visit = self.inputs.hidden.pop(place)
        tour = self.tours.tours[visit.job.device]
        tour.inputs, tour.hidden = tour.inputs + 1, tour.hidden - 1
        self.inputs.due.append(replace(visit, grad=grad_BTD))

    def answered(self, visit: Visit, *, is_gone: bool) -> None:
        """Note that a micro-batch has its gradient, and whether the coordinator learned from it.

        Args:
            visit: The micro-batch.
            is_gone: Whether its device waits for it no more.
        """
        device, message = visit.job.device, visit.message
        if not is_gone:
            self.tours.tours[device].inputs -= 1
        if visit.counts:
            self.tours.serve(device, *visit.where, message.num_micro)

    # ---- merges ----

    def merged(
        self, result: RoundResult, updates: Mapping[str, list[int]], *, evaluating: bool
    ) -> list[str]:
        """Take note that what was in the buffer is merged; return whose tours were too old for it.

        Args:
            result: What came of it.
            updates: Merges that each update had missed, by device.
            evaluating: Whether devices evaluate after the last merge.
        """
        state, self.faults.num_rewinds = self.tours, 0
        self.reporting.telemetry(state.round)
        self.reporting.begin_round()
        over = state.merged(len(self.inputs.uploads), evaluating=evaluating)
        self._starts.merged(result, state.round)
        for device in over:  # its factors are no longer those of the tour's start
            self._starts.forget(device)
            self.inputs.forget(device)
        dropped = over if state.phase is Phase.TRAINING else []
        for device in dropped:
            self.watcher.see(WorkDropped(state.round, device))
        self.watcher.see(ToursMerged(state.round, updates, state.standing(), dropped))
        return dropped

    # ---- checkpoints ----

    def facts(self) -> dict[str, Any]:
        """Return where the run stands, for a checkpoint."""
        return {**super().facts(), "buffered": self.tours.facts()}

    def restore(self, facts: Mapping[str, Any], *, in_new_process: bool) -> None:
        """Go back to where `facts` found the run; its devices come when they come."""
        self.tours.load_facts(facts["buffered"])
        super().restore(facts, in_new_process=in_new_process)
        self.inputs = Visits()
