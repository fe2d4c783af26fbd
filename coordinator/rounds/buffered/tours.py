"""Where each device stands where nobody waits for anybody. Pure: no socket, no clock, no tensor.

A device's round is its own: a *tour* of steps from the newest version of dW on, then an upload, and
the next tour. A version is a merge; docs/method.md, Rounds without a barrier.

    ready --begin--> on tour --last upload--> ready
                        |
                        +-- too many merges meanwhile: dropped --> ready

A device that leaves keeps its tour, and repeats it from its own checkpoint when it is back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coordinator.rounds.state import Action, Debt, Owed, Phase, RunState, drop_member
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.plan import MOST_IN_FLIGHT


@dataclass
class Tour:
    """What one device is on."""

    version: int
    """Merges that were done when it began."""
    begin: int
    """First step, by the device's own count."""
    end: int
    """The step after the last."""
    attempt: int = 0
    """Number of this try at it; answers to an earlier one are stale."""
    step: int = 0
    """Step and micro-batch whose input is due."""
    micro: int = 0
    counted_step: int = 0
    """Step and micro-batch from which on the coordinator's blocks have yet to learn."""
    counted_micro: int = 0
    inputs: int = 0
    """Micro-batches that wait for the coordinator."""
    hidden: int = 0
    """Micro-batches whose top gradient is due."""

    def counts(self, step: int, micro: int) -> bool:
        """Return whether the coordinator's blocks have yet to learn from a micro-batch."""
        return (step, micro) >= (self.counted_step, self.counted_micro)

    def advance(self, num_micro: int) -> None:
        """Note that the micro-batch that was due is here."""
        self.inputs += 1
        self.micro += 1
        if self.micro == num_micro:
            self.step, self.micro = self.step + 1, 0

    def count(self, step: int, micro: int, num_micro: int) -> None:
        """Note that the coordinator's blocks have learned from a micro-batch."""
        is_last = micro + 1 == num_micro
        self.counted_step, self.counted_micro = (step + 1, 0) if is_last else (step, micro + 1)

    def restart_at(self, step: int, attempt: int) -> None:
        """Go on from a step, under a new number."""
        self.attempt, self.step, self.micro = attempt, step, 0
        self.inputs = self.hidden = 0


@dataclass
class BufferedState(RunState):
    """Where a run stands between two events; `round` counts merges."""

    size: int | None = None
    """Updates of a merge; None: as many as there are devices."""
    max_staleness: int = 1
    tours: dict[str, Tour] = field(default_factory=dict)
    """By device, also of devices that have left in the middle of one."""
    next_steps: dict[str, int] = field(default_factory=dict)
    """First step of a device's next tour, by its own count."""
    num_updates: int = 0
    """Updates since the last merge."""
    device_steps: int = 0
    """Steps of devices since the coordinator's own last one."""
    is_step_open: bool = False
    """Whether the coordinator's blocks have learned anything since then."""
    server_steps: int = 0
    """The coordinator's own steps since the last merge."""

    @property
    def quota(self) -> int:
        """Updates of a merge, and device steps of one of the coordinator's own."""
        return self.size or max(1, len(self.ready))

    @property
    def schedule_step(self) -> int:
        """Where the coordinator's next step stands in the run's schedule."""
        return self.first_step + min(self.server_steps, self.steps_per_round - 1)

    # ---- devices ----

    def leave(self, name: str) -> bool:
        """Forget a device that is gone; its tour waits for it, and the run does not."""
        self.ready.pop(name, None)
        if name not in self.awaited:
            self.awaiting_eval.discard(name)
        drop_member(self, name)
        if not self.ready and self.phase is Phase.TRAINING:
            self.phase = Phase.GATHERING
        return False

    def wait_for(self, names: Iterable[str], unevaluated: Iterable[str] = ()) -> None:
        """Wait for devices at the end of the run, to evaluate; before, nobody waits."""
        if self.phase is Phase.CLOSING:
            super().wait_for(names, unevaluated)

    def start_round(self, names: Any = None) -> None:
        """Begin, with whoever is ready; from now on nobody is waited for."""
        self._expect(Phase.GATHERING)
        self.phase = Phase.TRAINING
        self.min_devices = 1

    # ---- tours ----

    def begin_tour(self, name: str, held: Iterable[int]) -> bool:
        """Let a ready device begin its next tour, or go on with one that it was on.

        Args:
            name: The device.
            held: Steps of which it has a checkpoint of its own.

        Returns:
            Whether it goes on from its checkpoint of `step`; else it takes over the newest dW.
        """
        member, tour = self.ready[name], self.tours.get(name)
        self.attempt += 1
        if tour is None:
            begin = self.next_steps.get(name, 0)
            tour = Tour(self.round, begin, begin + self.steps_per_round, counted_step=begin)
            self.tours[name] = tour
            held = ()
        last = tour.end - 1 if member.is_local else min(tour.counted_step, tour.end - 1)
        usable = [step for step in held if tour.begin <= step <= last]
        if not usable:
            tour.version = self.round
        tour.restart_at(max(usable, default=tour.begin), self.attempt)
        self.members[name] = member
        return bool(usable)

    def take_turn(self, name: str, step: int, micro: int) -> bool:
        """Take note of a micro-batch's input; return whether the coordinator is to learn from it.

        Raises:
            RemoteProtocolError: another one is due.
        """
        tour, member = self.tours[name], self.members[name]
        if (step, micro) != (tour.step, tour.micro) or step >= tour.end:
            raise RemoteProtocolError(
                f"step {step}.{micro} while {tour.step}.{tour.micro} is due before {tour.end}"
            )
        if tour.inputs + tour.hidden >= MOST_IN_FLIGHT:
            raise RemoteProtocolError(f"more than {MOST_IN_FLIGHT} micro-batches under way")
        tour.advance(member.num_micro)
        return tour.counts(step, micro)

    def serve(self, name: str, step: int, micro: int, num_micro: int) -> None:
        """Note that the coordinator's blocks have learned from a micro-batch of a device."""
        self.is_step_open = True
        tour = self.tours.get(name)
        if tour is not None and tour.begin <= step < tour.end:
            tour.count(step, micro, num_micro)
        self.device_steps += micro + 1 == num_micro

    @property
    def is_step_due(self) -> bool:
        """Whether the coordinator's own step has seen enough of the devices'."""
        return self.device_steps >= self.quota

    def finish_step(self) -> None:
        """Note that the coordinator has taken its own step."""
        self.server_steps += 1
        self.step = self.schedule_step
        self.device_steps, self.is_step_open = 0, False

    def end_tour(self, name: str) -> Tour:
        """Note that a device's upload is here; return the tour that it ends.

        Raises:
            RemoteProtocolError: not all of its steps have come.
        """
        tour, member = self.tours[name], self.members[name]
        if not member.is_local and (tour.step < tour.end or tour.inputs or tour.hidden):
            raise RemoteProtocolError(f"an upload after step {tour.step} of {tour.end}")
        del self.members[name]
        self.next_steps[name] = tour.end
        self.num_updates += 1
        return self.tours.pop(name)

    def num_steps(self, name: str) -> int:
        """Count the steps of the tour that a device is on."""
        return self.tours[name].end - self.tours[name].begin

    # ---- merges ----

    def merged(self, num_left: int, *, evaluating: bool) -> list[str]:
        """Note that what was in the buffer is merged; return whose tours are over without an end.

        Args:
            num_left: Updates that came too late for this merge and are in the next.
            evaluating: Whether devices evaluate after the last merge.
        """
        self._expect(Phase.TRAINING)
        self.round += 1
        self.step, self.server_steps, self.num_updates = self.first_step, 0, num_left
        is_last = self.round == self.total_rounds
        over = [
            name
            for name, tour in sorted(self.tours.items())
            if is_last or self.round - tour.version > self.max_staleness
        ]
        for name in over:
            self.next_steps[name] = self.tours.pop(name).end
            self.members.pop(name, None)
        if is_last:
            self.phase = Phase.CLOSING
            self.awaiting_eval = set(self.ready) if evaluating else set()
        return over

    def standing(self) -> dict[str, tuple[int, int]]:
        """Return the version that each tour began with, and the merges since, by device."""
        return {n: (t.version, self.round - t.version) for n, t in sorted(self.tours.items())}

    def decide(self) -> Action:
        """Return what must be done now, beside serving whoever has sent something."""
        if self.phase is Phase.GATHERING:
            is_enough = len(self.ready) >= self.min_devices
            return Action.START_ROUND if is_enough else Action.WAIT
        if self.phase is Phase.TRAINING:
            return Action.AGGREGATE if self.num_updates >= self.quota else Action.WAIT
        return super().decide()

    # ---- checkpoints ----

    def facts(self) -> dict[str, Any]:
        """Return where the tours stand, as JSON can hold it."""
        return {
            "tours": {name: asdict(tour) for name, tour in sorted(self.tours.items())},
            "next_steps": dict(sorted(self.next_steps.items())),
            "num_updates": self.num_updates,
            "server_steps": self.server_steps,
        }

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Take over what `facts` returned; everybody has left."""
        self.tours = {name: Tour(**tour) for name, tour in facts["tours"].items()}
        self.next_steps = dict(facts["next_steps"])
        self.num_updates, self.server_steps = facts["num_updates"], facts["server_steps"]
        self.members, self.device_steps, self.is_step_open = {}, 0, False


def tour_debts(state: RunState) -> dict[str, Debt]:
    """Return what devices on tour owe, by device; see `debts`."""
    assert isinstance(state, BufferedState)
    owed: dict[str, Debt] = {}
    for name, member in state.members.items():
        tour = state.tours[name]
        where = tour.attempt, tour.step, tour.micro
        if member.is_local or (tour.step == tour.end and not tour.inputs + tour.hidden):
            owed[name] = Debt(Owed.UPLOAD, where)
        elif not tour.inputs:
            owed[name] = Debt(Owed.GRADIENT if tour.hidden else Owed.INPUT, where)
    return owed
