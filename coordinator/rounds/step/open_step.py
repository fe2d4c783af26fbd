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
from typing import NamedTuple, Protocol

from coordinator.rounds.step.wave_choice import Candidate, Limits, Rows, choose
from edge_sdk.protocol.plan import MOST_AWAY, MOST_IN_FLIGHT, Place

# Of the rows that all members send at once, one micro-batch each, a wave has at most this part:
# while it is computed, the answers to the others are being worked on.
WAVE_PART = 4

Doing = Enum("Doing", "NOTHING TRAIN FORWARD BACKWARD FINISH")
Arrival = Enum("Arrival", "NOW LATER STALE BEYOND")


class InStep(Protocol):
    """A member of the round, as far as its steps go."""

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step."""

    @property
    def is_local(self) -> bool:
        """Whether it takes no part in waves."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it takes a final hidden state before the gradient of the micro-batch before."""


Members = Mapping[str, InStep]


class Due(NamedTuple):
    """What the coordinator can compute now."""

    doing: Doing
    places: list[Place]


@dataclass
class OpenStep:
    """What is here of a step, what is away, and what is done."""

    sizes: dict[Place, Rows] = field(default_factory=dict)
    """All that has come and is not answered, in the order of arrival."""
    away: list[list[Place]] = field(default_factory=list)
    """Waves between their forward and their backward half."""
    returned: set[Place] = field(default_factory=set)
    """Those of them whose gradients are here."""
    answered: dict[str, int] = field(default_factory=dict)
    """Micro-batches that are done, by device."""
    num_waves: int = 0
    """Forward passes that have been made."""

    # ---- what happens ----

    def arrive(self, place: Place, rows: Rows) -> None:
        """Note that the hidden state of a micro-batch is here."""
        self.sizes[place] = rows

    def come_back(self, place: Place) -> None:
        """Note that the gradient of a micro-batch that was away is here."""
        self.returned.add(place)

    def send_away(self, places: Iterable[Place]) -> None:
        """End the forward half of a wave; those that have left meanwhile are no part of it."""
        self.num_waves += 1
        if wave := [place for place in places if place in self.sizes]:
            self.away.append(wave)

    def answer(self, places: Iterable[Place], *, is_new_wave: bool) -> None:
        """End a wave."""
        self.num_waves += is_new_wave
        done = {place for place in places if place in self.sizes}
        for device, _ in done:
            self.answered[device] = self.answered.get(device, 0) + 1
        self._forget(done)

    def drop(self, device: str) -> None:
        """Forget a device that is no member any more."""
        self.answered.pop(device, None)
        self._forget({place for place in self.sizes if place[0] == device})

    def _forget(self, places: set[Place]) -> None:
        self.sizes = {place: rows for place, rows in self.sizes.items() if place not in places}
        self.returned -= places
        rest = ([place for place in wave if place not in places] for wave in self.away)
        self.away = [wave for wave in rest if wave]

    # ---- what is true ----

    def next_micro(self, device: str) -> int:
        """Return the number of the micro-batch of *device* that comes next."""
        return self.answered.get(device, 0) + sum(place[0] == device for place in self.sizes)

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
        return place not in self.returned and any(place in wave for wave in self.away)

    def is_complete(self, members: Members) -> bool:
        """Return whether all members have all answers."""
        return all(not self._left(name, m) for name, m in members.items())

    def _left(self, name: str, member: InStep) -> int:
        """Count the answers that a member still needs."""
        return 0 if member.is_local else member.num_micro - self.answered.get(name, 0)

    def owing(self, members: Members) -> dict[str, tuple[bool, int]]:
        """Return of whom something is awaited: whether it is a gradient, and of which micro-batch.

        Whoever has sent a hidden state that is not computed yet owes none at that moment.
        """
        owed = {}
        for name, member in members.items():
            here = [place for place in self.sizes if place[0] == name]
            if gone := [micro for _, micro in filter(self.is_away, here)]:
                owed[name] = (True, min(gone))
            elif not here and self._left(name, member):
                owed[name] = (False, self.answered.get(name, 0))
        return owed

    # ---- what to do ----

    def work(self, members: Members, most_tokens: int, *, labels_on_device: bool) -> Due:
        """Return what can be computed now, in waves of at most so many tokens."""
        if wave := self._back():
            return Due(Doing.BACKWARD, wave)
        at_once = sum(-(-m.batch_size // m.num_micro) for m in members.values() if not m.is_local)
        away = sum(self.sizes[place].num for wave in self.away for place in wave)
        room = MOST_AWAY * at_once - away
        limits = Limits(most_tokens, min(-(-at_once // WAVE_PART), room))
        places = choose(self._waiting(members, labels_on_device=labels_on_device), limits)
        if away and sum(self.sizes[place].num for place in places) > room:
            places = []
        if places:
            return Due(Doing.FORWARD if labels_on_device else Doing.TRAIN, places)
        return Due(Doing.FINISH if self.is_complete(members) else Doing.NOTHING, [])

    def _back(self) -> list[Place]:
        """Return the oldest wave that can go back; a device gets its answers in their order."""
        earlier = set[str]()
        for wave in self.away:
            devices = {device for device, _ in wave}
            if not devices & earlier and all(place in self.returned for place in wave):
                return wave
            earlier |= devices
        return []

    def _waiting(self, members: Members, *, labels_on_device: bool) -> list[Candidate]:
        """Return what can go forward now, in the order of arrival."""
        away = {place for wave in self.away for place in wave}
        busy = {device for device, _ in away}
        waiting = []
        for (device, micro), rows in self.sizes.items():
            member = members[device]
            is_next = device not in busy or member.looks_ahead or not labels_on_device
            if is_next and (device, micro) not in away:
                busy.add(device)
                waiting.append(Candidate((device, micro), rows, member.num_micro - micro))
        return waiting
