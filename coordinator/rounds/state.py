"""Where a run stands and what the coordinator must do next. Pure: no socket, no clock, no tensor.

A round is a sequence of steps, a step a sequence of waves: wave j takes the j-th micro-batch of
every member that has one. With `labels: device` a wave has two halves, forward and backward.

    GATHERING --enough devices--> TRAINING --last step--> COLLECTING --all uploads--> GATHERING
        ^                            |                        |                  or CLOSING
        +------- too few are left ---+------------------------+

Members of a round are fixed at its start; a device that joins later waits for the next one. One
that leaves is forgotten, and the round goes on with the others while there are enough of them; else
it starts again from its beginning, under a new attempt number, as soon as there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from edge_sdk.errors import LocalProtocolError
from edge_sdk.protocol.plan import MOST_IN_FLIGHT

NOBODY: Mapping[str, int] = MappingProxyType({})
Phase = Enum("Phase", "GATHERING TRAINING COLLECTING CLOSING")
Action = Enum("Action", "WAIT START_ROUND FORWARD BACKWARD RUN_WAVE AGGREGATE HAND_OUT CLOSE")


@dataclass(frozen=True, slots=True)
class Member:
    """What the state of a run knows of a device that is ready to train."""

    name: str
    split: int
    batch_size: int
    num_micro: int
    is_local: bool
    """Whether it holds the whole model and takes no part in waves."""


@dataclass
class RunState:
    """Where a run stands between two events."""

    total_rounds: int
    steps_per_round: int
    min_devices: int
    labels_on_device: bool
    least_devices: int | None = None
    """Devices that a round needs once a step of the run is done; None: as many as before."""
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
    is_handed_out: bool = False
    """Whether the last aggregation is on its way to them."""
    awaited: set[str] = field(default_factory=set)
    """Devices that took part before the coordinator restarted: a round waits for them too."""
    begins: dict[str, int] = field(default_factory=dict)
    """First step of the round that a member trains; missing where it is the round's own first."""

    @property
    def first_step(self) -> int:
        """First step of the current round."""
        return self.round * self.steps_per_round

    @property
    def end_step(self) -> int:
        """First step after the current round."""
        return (self.round + 1) * self.steps_per_round

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
        was_member = self.members.pop(name, None) is not None
        self.arrived.discard(name)
        self.uploaded.discard(name)
        if was_member and len(self.members) < self.min_devices and self.phase in _IN_ROUND:
            self._rewind()
            return True
        return False

    def restore(
        self, round_: int, step: int, attempt: int, begins: Mapping[str, int] = NOBODY
    ) -> None:
        """Go on from a checkpoint; attempts since then keep their numbers."""
        self.round, self.step, self.safe_step = round_, step, step
        self.attempt = max(attempt, self.attempt)
        self.begins = dict(begins)
        is_last = round_ == self.total_rounds
        self.phase = Phase.CLOSING if is_last else Phase.GATHERING

    def saved(self) -> None:
        """Note that there is a checkpoint of this step."""
        self.safe_step = self.step

    def wait_for(self, names: Iterable[str], unevaluated: Iterable[str] = ()) -> None:
        """Wait for devices that are on their way back; some of them have yet to evaluate."""
        self.awaited |= set(names)
        self.awaiting_eval |= set(unevaluated)

    def stop_waiting(self) -> None:
        """Wait no longer for devices that are not back yet."""
        self.awaiting_eval -= self.awaited
        self.awaited = set()

    def _rewind(self) -> None:
        """Give the round up and gather devices for another attempt at it."""
        self.phase = Phase.GATHERING
        self.step = self.safe_step
        self._begin_wave(0)
        self.members, self.uploaded = {}, set()

    def start_round(self) -> None:
        """Let all that are ready train together from now on."""
        self._expect(Phase.GATHERING)
        self.members = dict(sorted(self.ready.items()))
        self.uploaded = set()
        self.attempt += 1
        self._begin_wave(0)
        self.phase = Phase.TRAINING
        self._skip_empty()

    def begin_at(self, name: str, step: int) -> None:
        """Note that a member trains the round from *step* on."""
        self.begins[name] = step

    def arrive(self, name: str) -> None:
        """Note that a member's part of the current half-wave is here."""
        self.arrived.add(name)

    def finish_forward(self) -> None:
        """End the wave's forward half; the members compute their losses."""
        self.is_forward_done = True
        self.arrived = set()

    def finish_wave(self) -> None:
        """End the wave and, where it was the last one, the step."""
        self._begin_wave(self.micro + 1)
        if not self.expected():
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
        self.members, self.uploaded, self.begins = {}, set(), {}
        is_last = self.round == self.total_rounds
        self.awaiting_eval = evaluating if is_last else set()
        self.phase = Phase.CLOSING if is_last else Phase.GATHERING

    def hand_out(self) -> None:
        """Note that the last aggregation is on its way to everybody who was in it."""
        self.is_handed_out = True

    def report_eval(self, name: str) -> None:
        """Note that a device has gone through its validation data."""
        self.awaiting_eval.discard(name)

    def _begin_wave(self, micro: int) -> None:
        self.micro, self.arrived, self.is_forward_done = micro, set(), False

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
        if not self.arrived >= self.expected():
            return Action.WAIT
        if not self.labels_on_device:
            return Action.RUN_WAVE
        return Action.BACKWARD if self.is_forward_done else Action.FORWARD


_IN_ROUND = (Phase.TRAINING, Phase.COLLECTING)
