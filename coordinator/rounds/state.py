"""Where a run stands and what the coordinator must do next. Pure: no socket, no clock, no tensor.

A round is a sequence of steps, a step a sequence of waves. With `waves: gathered` wave j takes the
j-th micro-batch of every member that has one; with `waves: available` waves are made of what is
there (`step/open_step.py`). With `labels: device` a wave has two halves, forward and backward.

    GATHERING --enough devices--> TRAINING --last step--> COLLECTING --all uploads--> GATHERING
        ^                            |                        |                  or CLOSING
        +------- too few are left ---+------------------------+

Members of a round are fixed at its start; a device that joins later waits for the next one. One
that leaves is forgotten, and the round goes on with the others while there are enough of them; else
it starts again from its beginning, under a new attempt number, as soon as there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from coordinator.rounds.step.open_step import Arrival, Doing, Due, OpenStep
from edge_sdk.errors import LocalProtocolError
from edge_sdk.protocol.plan import MOST_IN_FLIGHT, Place

# Losses and misses in a row after which a device sits out rounds, and the most that it sits out.
LOSSES_UNTIL_REST, MOST_REST = 2, 8
# So often a device may break the rules of a run; then the run is over for it.
MOST_EXPULSIONS = 3
NOBODY: Mapping[str, int] = MappingProxyType({})
Phase = Enum("Phase", "GATHERING TRAINING COLLECTING CLOSING")
Action = Enum(
    "Action",
    "WAIT START_ROUND FORWARD BACKWARD RUN_WAVE FINISH_STEP AGGREGATE HAND_OUT CLOSE",
)
Owed = Enum("Owed", "RETURN INPUT GRADIENT UPLOAD EVALUATION")


class Debt(NamedTuple):
    """What a device owes the run."""

    kind: Owed
    where: tuple[int, ...]
    """Attempt, step and micro-batch."""


@dataclass(frozen=True, slots=True)
class Member:
    """What the state of a run knows of a device that is ready to train."""

    name: str
    split: int
    batch_size: int
    num_micro: int
    is_local: bool
    """Whether it holds the whole model and takes no part in waves."""
    looks_ahead: bool = False
    """Whether it takes a final hidden state before the gradient of the micro-batch before."""
    marks: bool = False
    """Whether it can save itself in mid-round and go on."""
    skips: bool = False
    """Whether it can be told that a round goes on without it."""


@dataclass
class RunState:
    """Where a run stands between two events."""

    total_rounds: int
    steps_per_round: int
    min_devices: int
    labels_on_device: bool
    wave_tokens: int | None = None
    """Most tokens of a wave that is made of what is there; None: waves are gathered."""
    least_devices: int | None = None
    """Devices that a round needs once a step of the run is done; None: as many as before."""
    per_round: int | None = None
    """Most devices of a round; None: all that are ready."""
    phase: Phase = Phase.GATHERING
    round: int = 0
    step: int = 0
    micro: int = 0
    attempt: int = 0
    safe_step: int = 0
    """Step of the newest checkpoint; where the round begins again after a rewind."""
    ready: dict[str, Member] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    """Members whose part of the current half-wave is here."""
    is_forward_done: bool = False
    uploaded: set[str] = field(default_factory=set)
    awaiting_eval: set[str] = field(default_factory=set)
    """Devices that have yet to evaluate the last aggregation."""
    evaluating: set[str] = field(default_factory=set)
    """Members that evaluate before their first step."""
    is_handed_out: bool = False
    """Whether the last aggregation is on its way to them."""
    awaited: set[str] = field(default_factory=set)
    """Devices that took part before the coordinator restarted: a round waits for them too."""
    kept: set[str] = field(default_factory=set)
    """Members that have left since their part of the round, or of what is being saved, is whole."""
    begins: dict[str, int] = field(default_factory=dict)
    """First step of the round that a member trains; missing where it is the round's own first."""
    here: OpenStep = field(default_factory=OpenStep)
    """What is here of the step, where waves are not gathered."""

    @property
    def first_step(self) -> int:
        """First step of the current round."""
        return self.round * self.steps_per_round

    @property
    def end_step(self) -> int:
        """First step after the current round."""
        return (self.round + 1) * self.steps_per_round

    @property
    def least_members(self) -> int:
        """Members without which a round is given up."""
        return min(self.min_devices, self.per_round or self.min_devices)

    @property
    def is_in_round(self) -> bool:
        """Whether members are on their way through a round."""
        return self.phase in _IN_ROUND

    @property
    def is_gathered(self) -> bool:
        """Whether a wave waits for its micro-batch of every member."""
        return self.wave_tokens is None

    @property
    def work(self) -> Due:
        """What can be computed now of a step whose waves are not gathered."""
        assert self.wave_tokens is not None
        return self.here.work(
            self.members, self.wave_tokens, labels_on_device=self.labels_on_device
        )

    # ---- what happens ----

    def join(self, member: Member) -> None:
        """Add a device that is ready; it takes part from the next round on."""
        self.leave(member.name)
        self.ready[member.name] = member
        self.awaited.discard(member.name)

    def leave(self, name: str) -> bool:
        """Forget a device that is gone; return whether the round had to be given up."""
        self.ready.pop(name, None)
        if name not in self.awaited:
            self.awaiting_eval.discard(name)
        if name in self.kept:
            self.evaluating.discard(name)
            return False
        was_member = drop_member(self, name)
        if was_member and len(self.members) < self.least_members and self.is_in_round:
            self._rewind()
            return True
        return False

    def restore(
        self, round_: int, step: int, attempt: int, begins: Mapping[str, int] = NOBODY
    ) -> None:
        """Go on from a checkpoint; attempts since then keep their numbers."""
        self.round, self.step, self.safe_step = round_, step, step
        self.attempt = max(attempt, self.attempt)
        self.begins, self.kept = dict(begins), set()
        is_last = round_ == self.total_rounds
        self.phase = Phase.CLOSING if is_last else Phase.GATHERING

    def saved(self) -> None:
        """Note that there is a checkpoint of this step."""
        self.safe_step = self.step

    def wait_for(self, names: Iterable[str], unevaluated: Iterable[str] = ()) -> None:
        """Wait for devices that are on their way back; some of them have yet to evaluate."""
        self.awaited |= set(names)
        self.awaiting_eval |= set(unevaluated)

    def stop_waiting(self, names: Iterable[str]) -> None:
        """Wait no longer for devices that are not back yet."""
        self.awaiting_eval -= self.awaited & set(names)
        self.awaited -= set(names)

    def _rewind(self) -> None:
        """Give the round up and gather devices for another attempt at it."""
        self.phase = Phase.GATHERING
        self.step = self.safe_step
        self._begin_wave(0)
        self.members, self.uploaded, self.evaluating, self.kept = {}, set(), set(), set()

    def start_round(self, names: Iterable[str] | None = None) -> None:
        """Let ready devices of these *names* train together; None: all of them."""
        self._expect(Phase.GATHERING)
        self.members = {n: self.ready[n] for n in sorted(self.ready if names is None else names)}
        self.uploaded, self.evaluating = set(), set()
        self.attempt += 1
        self._begin_wave(0)
        self.phase = Phase.TRAINING
        self._skip_empty()

    def begin_at(self, name: str, step: int) -> None:
        """Note that a member trains the round from *step* on."""
        self.begins[name] = step

    def arrive(self, name: str) -> None:
        """Note that a member's part of the current half-wave is here; waves are gathered."""
        self.arrived.add(name)

    def finish_forward(self) -> None:
        """End the wave's forward half; the members compute their losses."""
        self.is_forward_done = True
        self.arrived = set()

    def finish_wave(self) -> None:
        """End the wave and, where it was the last one, the step."""
        if self.is_gathered:
            self._begin_wave(self.micro + 1)
        if not (self.is_gathered and self.expected()):
            self.step += 1
            self._begin_wave(0)
            self._skip_empty()

    def num_steps(self, name: str) -> int:
        """Count the steps of the round that a member trains."""
        return self.end_step - self.begins.get(name, self.first_step)

    def report_step(self) -> None:
        """Note that a member has trained a step: from now on fewer devices may be enough."""
        self.min_devices = self.min_devices if self.least_devices is None else self.least_devices

    def upload(self, name: str) -> None:
        """Note that a member's factors of the round are here."""
        self.uploaded.add(name)

    def finish_round(self, *, evaluating: set[str]) -> None:
        """End the aggregated round; after the last one *evaluating* devices have yet to report."""
        self._expect(Phase.COLLECTING)
        self.round += 1
        self.step = self.round * self.steps_per_round
        self.members, self.uploaded, self.begins, self.evaluating = {}, set(), {}, set()
        self.kept = set()
        is_last = self.round == self.total_rounds
        self.awaiting_eval = evaluating if is_last else set()
        self.phase = Phase.CLOSING if is_last else Phase.GATHERING

    def hand_out(self) -> None:
        """Note that the last aggregation is on its way to everybody who was in it."""
        self.is_handed_out = True

    def report_eval(self, name: str) -> None:
        """Note that a device has gone through its validation data."""
        self.awaiting_eval.discard(name)
        self.evaluating.discard(name)

    def _begin_wave(self, micro: int) -> None:
        self.micro, self.arrived, self.is_forward_done = micro, set(), False
        self.here = OpenStep()

    def _skip_empty(self) -> None:
        """Skip steps in which nobody needs the coordinator."""
        if self.phase is Phase.TRAINING and (self.step >= self.end_step or not self.expected()):
            self.step = self.end_step
            self.phase = Phase.COLLECTING

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise LocalProtocolError(f"not possible while {self.phase.name}")

    # ---- what to do ----

    def expected(self) -> set[str]:
        """Return the members that take part in the current wave."""
        return {
            name for name, m in self.members.items() if not m.is_local and m.num_micro > self.micro
        }

    def soon(self) -> set[tuple[int, int]]:
        """Return the waves, by step and micro-batch, whose input may come before their turn.

        They are of this step or, where others have more micro-batches, of the next.
        """
        here = {(self.step, self.micro + ahead) for ahead in range(1, MOST_IN_FLIGHT)}
        return here | {(self.step + 1, micro) for micro in range(MOST_IN_FLIGHT)}

    def decide(self) -> Action:
        """Return what must be done now."""
        if self.phase is Phase.GATHERING:
            is_enough = len(self.ready) >= self.min_devices and not self.awaited
            return Action.START_ROUND if is_enough else Action.WAIT
        if self.phase is Phase.TRAINING:
            return self._decide_wave()
        if self.phase is Phase.COLLECTING:
            return Action.AGGREGATE if self.uploaded >= self.members.keys() else Action.WAIT
        if not self.awaiting_eval:
            return Action.CLOSE
        return Action.WAIT if self.is_handed_out or self.awaited else Action.HAND_OUT

    def _decide_wave(self) -> Action:
        if not self.is_gathered:
            return _DOING[self.work.doing]
        if not self.arrived >= self.expected():
            return Action.WAIT
        if not self.labels_on_device:
            return Action.RUN_WAVE
        return Action.BACKWARD if self.is_forward_done else Action.FORWARD


_IN_ROUND = (Phase.TRAINING, Phase.COLLECTING)
_DOING = {
    Doing.NOTHING: Action.WAIT,
    Doing.TRAIN: Action.RUN_WAVE,
    Doing.FORWARD: Action.FORWARD,
    Doing.BACKWARD: Action.BACKWARD,
    Doing.FINISH: Action.FINISH_STEP,
}


def fit_for_round(state: RunState, resting: Container[str]) -> list[str]:
    """Return who may be in the next round: all but *resting* ones, if that leaves enough."""
    fit = [name for name in sorted(state.ready) if name not in resting]
    return fit if len(fit) >= state.least_members else sorted(state.ready)


def drop_member(state: RunState, name: str) -> bool:
    """Let the round go on without a member, which stays ready; return whether it was one."""
    for names in (state.arrived, state.uploaded, state.evaluating):
        names.discard(name)
    state.here.drop(name)
    return state.members.pop(name, None) is not None


def drop_kept(state: RunState) -> bool:
    """Drop members that have left after they saved themselves; return whether the round is over."""
    for name in sorted(state.kept - state.uploaded):
        state.kept.discard(name)
        drop_member(state, name)
    if len(state.members) >= state.least_members or not state.is_in_round:
        return False
    state._rewind()
    return True


def give_up_round(state: RunState) -> None:
    """Let whoever is ready try the round again, from the last checkpoint on."""
    if state.is_in_round:
        state._rewind()


def debts(state: RunState) -> dict[str, Debt]:
    """Return what devices owe that the run waits for, by device."""
    where = state.attempt, state.step, state.micro
    if state.phase is Phase.TRAINING and not state.is_gathered:
        owed = {
            name: Debt(
                Owed.GRADIENT if is_gradient else Owed.INPUT, (state.attempt, state.step, micro)
            )
            for name, (is_gradient, micro) in state.here.owing(state.members).items()
        }
    elif state.phase is Phase.TRAINING:
        kind = Owed.GRADIENT if state.is_forward_done else Owed.INPUT
        owed = dict.fromkeys(state.expected() - state.arrived, Debt(kind, where))
    elif state.phase is Phase.COLLECTING:
        owed = dict.fromkeys(state.members.keys() - state.uploaded, Debt(Owed.UPLOAD, where))
    else:
        is_due = state.phase is Phase.CLOSING and state.is_handed_out
        names = state.awaiting_eval if is_due else set()
        returns = dict.fromkeys(state.awaited, Debt(Owed.RETURN, where))
        return dict.fromkeys(names, Debt(Owed.EVALUATION, where)) | returns
    evaluating = state.evaluating & owed.keys()
    return owed | dict.fromkeys(evaluating, Debt(Owed.EVALUATION, where))


def judge(state: RunState, name: str, step: int, micro: int) -> Arrival:
    """Return what becomes of a member's hidden state of a step and micro-batch."""
    where, now = (step, micro), (state.step, state.micro)
    if not state.is_gathered and step == state.step:
        return state.here.judge(name, micro)
    if where == now:
        is_due = name not in state.arrived and not state.is_forward_done
        return Arrival.NOW if is_due else Arrival.STALE
    is_next = step == state.step + 1 and micro < MOST_IN_FLIGHT
    if is_next if not state.is_gathered else where in state.soon():
        return Arrival.LATER
    return Arrival.BEYOND if where > now else Arrival.STALE


def awaits_gradient(state: RunState, place: Place) -> bool | None:
    """Return whether a gradient of this step is due; None for one that is stale."""
    device, micro = place
    if state.is_gathered:
        return state.is_forward_done if micro == state.micro else None
    is_stale = micro < state.here.answered.get(device, 0) or place in state.here.away.returned
    return None if is_stale else state.here.is_away(place)


def is_between_steps(state: RunState) -> bool:
    """Return whether nothing of the step has been computed yet."""
    return state.micro == 0 and not state.is_forward_done and not state.here.num_waves


def may_leave(state: RunState, device: str, leavers: Container[str]) -> bool:
    """Return whether one of several *leavers* may go now, and nothing that was done is lost by it.

    In mid-round that is so where enough others go on, or where nothing was done since the last
    checkpoint; where somebody trains alone, no round is saved on its way. At its end a member stays
    for the start of the next one: of that it keeps a checkpoint of its own.
    """
    if state.phase is Phase.GATHERING:
        return device not in state.ready or state.decide() is Action.WAIT
    if device not in state.members or state.members[device].is_local:
        return True
    left = [name for name in state.members if name not in leavers]
    is_spare = len(left) >= state.least_members or state.step <= state.safe_step
    has_local = any(member.is_local for member in state.members.values())
    return state.phase is Phase.TRAINING and (is_spare or has_local)


def has_steps_done(state: RunState, device: str) -> bool:
    """Return whether a member can have trained all of its steps of the round."""
    is_last = state.step >= state.end_step - 1
    return state.phase is not Phase.TRAINING or is_last or state.members[device].is_local


def wave(state: RunState) -> int:
    """Return the number in its step of the wave that is run next."""
    return state.micro if state.is_gathered else state.here.num_waves


def places(state: RunState) -> list[Place]:
    """Return the micro-batches that take part in what is to be computed now."""
    if state.is_gathered:
        return [(name, state.micro) for name in sorted(state.expected())]
    return state.work.places


def is_step_complete(state: RunState) -> bool:
    """Return whether the wave that is over was the last one of its step."""
    if not state.is_gathered:
        return state.here.is_complete(state.members)
    return not any(m.num_micro > state.micro + 1 for m in state.members.values())


@dataclass
class Conduct:
    """How devices have behaved in this run: who sits out rounds, and for whom it is over."""

    expulsions: dict[str, int] = field(default_factory=dict)
    _losses: dict[str, int] = field(default_factory=dict)
    """Times in a row that a device was lost in a round, or missed its end."""
    _refused: dict[str, int] = field(default_factory=dict)
    """Times in a row that its upload was left out."""
    _rests_until: dict[str, int] = field(default_factory=dict)
    """First round that a device is in again."""

    def expelled(self, device: str) -> None:
        """Note that a device broke the rules."""
        self.expulsions[device] = self.expulsions.get(device, 0) + 1

    def is_over(self, device: str) -> bool:
        """Return whether a device has broken the rules too often."""
        return self.expulsions.get(device, 0) >= MOST_EXPULSIONS

    def lost(self, device: str, round_: int) -> None:
        """Note that a device was lost in a round, or missed its end."""
        self._losses[device] = self._losses.get(device, 0) + 1
        self._rest(device, self._losses[device], round_)

    def _rest(self, device: str, times: int, round_: int) -> None:
        over = times - LOSSES_UNTIL_REST
        if over >= 0:
            self._rests_until[device] = round_ + 1 + min(2**over, MOST_REST)

    def refused(self, device: str, round_: int) -> None:
        """Note that what a device has uploaded is left out of a round."""
        self._refused[device] = self._refused.get(device, 0) + 1
        self._rest(device, self._refused[device], round_)

    def spare(self, device: str, round_: int) -> None:
        """Let a device sit the round that goes on out, whoever was the reason that it failed."""
        self._refused[device] = self._refused.get(device, 0) + 1
        rounds = min(2 ** (self._refused[device] - 1), MOST_REST)
        self._rests_until[device] = round_ + rounds

    def accepted(self, device: str) -> None:
        """Note that what a device has uploaded is in a round."""
        self._refused.pop(device, None)

    def finished(self, device: str) -> None:
        """Note that a device has done its part of a round."""
        self._losses.pop(device, None)

    def resting(self, devices: Iterable[str], round_: int) -> set[str]:
        """Return those of *devices* that sit a round out."""
        return {name for name in devices if self._rests_until.get(name, 0) > round_}
