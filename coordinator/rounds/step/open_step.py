"""Where a step stands whose waves are made of what is there. Pure: no tensor, no clock.

A micro-batch waits from its arrival until it is run. With `labels: server` its answer ends it. With
`labels: device` it is then away: its device has the final hidden state, until the gradient is back;
those that went forward together go back together, as they are one graph. The step is complete when
every member has the answers to all of its micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from coordinator.rounds.step.away import Away
from coordinator.rounds.step.wave_choice import (
    BatchQueue,
    InStep,
    Limits,
    Members,
    Rows,
    Turns,
)
from edge_sdk.protocol.plan import MOST_AWAY, MOST_IN_FLIGHT, Place

# Of the rows that all members send at once, one micro-batch each, a wave has at most this part:
# while it is computed, the answers to the others are being worked on.
WAVE_PART = 4

Doing = Enum("Doing", "NOTHING TRAIN FORWARD BACKWARD FINISH")
Arrival = Enum("Arrival", "NOW LATER STALE BEYOND")


class Due(NamedTuple):
    """What the coordinator can compute now."""

    doing: Doing
    places: list[Place]


@dataclass
class StepTally:
    """What all members together still need of a step; during one, members only leave."""

    _num_members: int = -1
    _at_once: int = 0
    _unfinished: set[str] = field(default_factory=set)
    _answered: list[str] = field(default_factory=list)
    """Devices that have had an answer since the last look."""

    def answered(self, device: str) -> None:
        """Note that a device has had an answer."""
        self._answered.append(device)

    def at_once(self, members: Members, answered: Mapping[str, int]) -> int:
        """Count the rows that all members send at once, one micro-batch each."""
        self._look(members, answered)
        return self._at_once

    def is_complete(self, members: Members, answered: Mapping[str, int]) -> bool:
        """Return whether all members have all answers."""
        self._look(members, answered)
        return not self._unfinished

    def _look(self, members: Members, answered: Mapping[str, int]) -> None:
        if len(members) != self._num_members:
            self._num_members = len(members)
            waves = [m for m in members.values() if not m.is_local]
            self._at_once = sum(-(-m.batch_size // m.num_micro) for m in waves)
            self._unfinished = {n for n, m in members.items() if answers_left(n, m, answered)}
        for device in self._answered:
            if device in members and not answers_left(device, members[device], answered):
                self._unfinished.discard(device)
        self._answered.clear()


def answers_left(name: str, member: InStep, answered: Mapping[str, int]) -> int:
    """Count the answers that a member still needs."""
    return 0 if member.is_local else member.num_micro - answered.get(name, 0)


@dataclass
class OpenStep:
    """What is here of a step, what is away, and what is done.

    It is asked after every message and before every wave. With a thousand members it must not go
    through all of them, but where one has left.
    """

    sizes: dict[Place, Rows] = field(default_factory=dict)
    """All that has come and is not answered."""
    arrivals: BatchQueue = field(default_factory=BatchQueue)
    """That of it which waits."""
    away: Away = field(default_factory=Away)
    """Waves between their forward and their backward half."""
    answered: dict[str, int] = field(default_factory=dict)
    """Micro-batches that are done, by device."""
    num_waves: int = 0
    """Forward passes that have been made."""
    _micros: dict[str, set[int]] = field(default_factory=dict)
    """Micro-batches of `sizes`, by device."""
    _rows_away: int = 0
    _due: Due | None = None
    """What `work` has found, until something happens."""
    _asked: tuple[int, int, bool] = -1, 0, False
    """For how many members, and what else; in an attempt members only leave."""
    _tally: StepTally = field(default_factory=StepTally)

    # ---- what happens ----

    def arrive(self, place: Place, rows: Rows) -> None:
        """Note that the hidden state of a micro-batch is here."""
        self._due = None
        self.sizes[place] = rows
        self._micros.setdefault(place[0], set()).add(place[1])
        self.arrivals.add(place, rows)

    def come_back(self, place: Place) -> None:
        """Note that the gradient of a micro-batch that was away is here."""
        self._due = None
        self.away.come_back(place)

    def send_away(self, places: Iterable[Place]) -> None:
        """End the forward half of a wave; those that have left meanwhile are no part of it."""
        self._due = None
        self.num_waves += 1
        wave = [place for place in places if place in self.sizes]
        for place in wave:
            self._rows_away += self.sizes[place].num
            self.arrivals.remove(place)
        if wave:
            self.away.send(wave)

    def answer(self, places: Iterable[Place], *, is_new_wave: bool) -> None:
        """End a wave."""
        self._due = None
        self.num_waves += is_new_wave
        for place in {place for place in places if place in self.sizes}:
            device = place[0]
            self.answered[device] = self.answered.get(device, 0) + 1
            self._tally.answered(device)
            self._forget(place)

    def drop(self, device: str) -> None:
        """Forget a device that is no member any more."""
        self._due = None
        self.answered.pop(device, None)
        for micro in list(self._micros.get(device, ())):
            self._forget((device, micro))

    def _forget(self, place: Place) -> None:
        rows, device = self.sizes.pop(place), place[0]
        self._micros[device].discard(place[1])
        if not self._micros[device]:
            del self._micros[device]
        if place in self.away:
            self.away.remove(place)
            self._rows_away -= rows.num
            self.arrivals.look_again(device)
        else:
            self.arrivals.remove(place)

    # ---- what is true ----

    def next_micro(self, device: str) -> int:
        """Return the number of the micro-batch of *device* that comes next."""
        return self.answered.get(device, 0) + len(self._micros.get(device, ()))

    def judge(self, device: str, micro: int) -> Arrival:
        """Return what becomes of a hidden state that has come for this step."""
        due = self.next_micro(device)
        if micro < due:
            return Arrival.STALE
        if micro >= self.answered.get(device, 0) + MOST_IN_FLIGHT:
            return Arrival.BEYOND
        # One before it may have to be sent again.
        return Arrival.NOW if micro == due else Arrival.LATER

    def is_away(self, place: Place) -> bool:
        """Return whether the gradient of a micro-batch is awaited."""
        return place in self.away and place not in self.away.returned

    def is_complete(self, members: Members) -> bool:
        """Return whether all members have all answers."""
        return self._tally.is_complete(members, self.answered)

    def owing(self, members: Members) -> dict[str, tuple[bool, int]]:
        """Return of whom something is awaited: whether it is a gradient, and of which micro-batch.

        Whoever has sent a hidden state that is not computed yet owes none at that moment.
        """
        owed = {}
        for name, member in members.items():
            micros = self._micros.get(name, ())
            if gone := [micro for micro in micros if self.is_away((name, micro))]:
                owed[name] = (True, min(gone))
            elif not micros and answers_left(name, member, self.answered):
                owed[name] = (False, self.answered.get(name, 0))
        return owed

    # ---- what to do ----

    def work(self, members: Members, most_tokens: int, *, labels_on_device: bool) -> Due:
        """Return what can be computed now, in waves of at most so many tokens.

        It is asked for twice, to decide and to do it.
        """
        asked = len(members), most_tokens, labels_on_device
        if self._due is None or asked != self._asked:
            self._asked = asked
            self._due = self._work(members, most_tokens, labels_on_device=labels_on_device)
        return self._due

    def _work(self, members: Members, most_tokens: int, *, labels_on_device: bool) -> Due:
        if wave := self.away.oldest_whole():
            return Due(Doing.BACKWARD, [*wave])
        at_once = self._tally.at_once(members, self.answered)
        room = MOST_AWAY * at_once - self._rows_away
        limits = Limits(most_tokens, min(-(-at_once // WAVE_PART), room))
        places = self.arrivals.choose(Turns(members, self.away.devices, labels_on_device), limits)
        if self._rows_away and sum(self.sizes[place].num for place in places) > room:
            places = []
        if places:
            return Due(Doing.FORWARD if labels_on_device else Doing.TRAIN, places)
        return Due(Doing.FINISH if self.is_complete(members) else Doing.NOTHING, [])
