"""Who keeps the run waiting, for how long that is right, and what is done then.

A device whose heartbeats live may still do nothing. Whoever owes something is measured against its
own pace and that of the others; bytes that arrive, or are confirmed, are progress. `ProgressClock`
is pure: moments are handed in. `Waits` looks at it for a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from coordinator.config.run import ServeConfig
from coordinator.gateway.interface import Gateway
from coordinator.planning.interface import InForce
from coordinator.results.events.event import nth
from coordinator.results.events.rounds import DevicesCutOff, DevicesMissing, Waiting, WaitingOver
from coordinator.rounds.run import Run
from coordinator.rounds.state import Action, Debt, Owed, Phase, RunState, debts
from edge_sdk.errors import PeerGone

# Seconds without progress after which a person is told whom the run waits for.
NAME_AFTER_S = 15.0
# Seconds between two looks: a look goes through all devices, and a run hears of each several times.
LOOK_EVERY_S = 0.1
# With many devices a look takes longer, and they come more rarely: so many seconds for each device.
LOOK_EACH_S = 0.0005
# A look that comes later than that does not count the rest: this process itself stood still.
MOST_LOOK_S = 2.0
# A device may take this many times what it takes otherwise, or the others take.
PACE_FACTOR = 4.0
# Waits of a device, of one kind, that its pace is taken from.
PACE_WAITS = 20
# After a round's deadline a step waits for nobody longer than this many times what others take, and
# anything for so many seconds: a moment does not tell a slow device from a busy machine.
LATE_FACTOR, LEAST_LATE_S = 2.0, 1.0
# What a device was lost for may have been honest work: next time it gets twice as long, so often.
MOST_DOUBLINGS = 2


class Reminder:
    """Says when to speak of what lasts: after some seconds, then each time that has doubled."""

    def __init__(self, first_s: float) -> None:
        self._next_s = first_s

    def is_due(self, lasts_s: float) -> bool:
        """Return whether to speak now of what has lasted for *lasts_s*."""
        if lasts_s < self._next_s:
            return False
        while self._next_s <= lasts_s:
            self._next_s *= 2
        return True


class Late(NamedTuple):
    """A device that owes something, or did so until now."""

    device: str
    debt: Debt
    seconds: float
    """Without progress, or all that it took in the end."""
    others_s: float | None
    """What others take for the like, in seconds; None where nobody has done it yet."""


class Look(NamedTuple):
    """What a look at the clock has shown."""

    named: list[Late]
    """To be told of now."""
    answered: list[Late]
    """Told of before, and here by now."""
    lost: list[Late]
    """Waited for long enough."""


@dataclass(slots=True)
class _Wait:
    """One device that owes something."""

    debt: Debt
    moved: int
    reminder: Reminder
    waited_s: float = 0.0
    quiet_s: float = 0.0
    """Since anything moved."""
    worst_s: float = 0.0
    """Longest time in which nothing moved."""
    is_named: bool = False


@dataclass
class ProgressClock:
    """Measures how long devices take for what they owe."""

    patience_s: float
    """Seconds without progress for which anybody is waited for."""
    _looked_s: float | None = None
    _waits: dict[str, _Wait] = field(default_factory=dict)
    _paces: dict[tuple[str, Owed], deque[float]] = field(default_factory=dict)
    _usual: dict[Owed, dict[str, float]] = field(default_factory=dict)
    """Medians of these."""
    _losses: dict[str, int] = field(default_factory=dict)

    def pause(self, now_s: float) -> None:
        """Let time pass in which the coordinator itself is what everybody waits for."""
        self._looked_s = now_s

    def look(
        self,
        now_s: float,
        owed: Mapping[str, Debt],
        moved: Mapping[str, int],
        here: Container[str],
    ) -> Look:
        """Return who is late by now.

        Args:
            now_s: Seconds on a clock that never goes back.
            owed: Who owes what at this moment.
            moved: A number for each device that grows while anything moves in its session.
            here: Devices that are ready; who owes nothing and is not here has left.
        """
        passed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, MOST_LOOK_S)
        self._looked_s = now_s
        for wait in self._waits.values():
            wait.waited_s += passed_s
            wait.quiet_s += passed_s
            wait.worst_s = max(wait.worst_s, wait.quiet_s)
        found = Look([], self._settle(owed, here), [])
        for name, debt in sorted(owed.items()):
            wait = self._wait(name, debt, moved.get(name, 0))
            if moved.get(name, 0) > wait.moved:
                wait.quiet_s = 0.0
            wait.moved = moved.get(name, 0)  # less than before: the end of a session moves nothing
            is_due = wait.reminder.is_due(wait.quiet_s)
            if not is_due and wait.quiet_s < self.patience_s:
                continue  # what others take is not looked up for everybody at every look
            late = Late(name, debt, wait.quiet_s, self._others_s(name, debt.kind))
            if wait.quiet_s >= self._limit_s(late, wait):
                found.lost.append(late)
            elif is_due:
                wait.is_named = True
                found.named.append(late)
        for late in found.lost:
            del self._waits[late.device]
            self._losses[late.device] = self._losses.get(late.device, 0) + 1
        return found

    def late(self) -> set[str]:
        """Return who takes longer for what it owes now than a round over its deadline can wait."""
        found = set()
        for name, wait in self._waits.items():
            kind = wait.debt.kind
            is_step = kind in (Owed.INPUT, Owed.GRADIENT)
            others_s = self._others_s(name, kind) if is_step else None
            if wait.waited_s >= max(LEAST_LATE_S, LATE_FACTOR * (others_s or 0.0)):
                found.add(name)
        return found

    def forget(self, device: str) -> None:
        """Let go of a device of which nothing is wanted any more."""
        self._waits.pop(device, None)

    def usual_s(self, device: str, kind: Owed) -> float | None:
        """Return the seconds that a device takes for the like; None before it has done any."""
        return self._usual.get(kind, {}).get(device)

    def _wait(self, device: str, debt: Debt, moved: int) -> _Wait:
        if device not in self._waits:
            usual_s = PACE_FACTOR * (self.usual_s(device, debt.kind) or 0.0)
            first_s = max(min(NAME_AFTER_S, self.patience_s / 4), usual_s)
            self._waits[device] = _Wait(debt, moved, Reminder(first_s))
        return self._waits[device]

    def _settle(self, owed: Mapping[str, Debt], here: Container[str]) -> list[Late]:
        """Learn from what is owed no longer; return who was told of."""
        answered = []
        for name, wait in list(self._waits.items()):
            if owed.get(name) == wait.debt:
                continue
            del self._waits[name]
            if name not in here:
                continue
            kind = wait.debt.kind
            self._losses.pop(name, None)
            pace = self._paces.setdefault((name, kind), deque(maxlen=PACE_WAITS))
            pace.append(wait.worst_s)
            self._usual.setdefault(kind, {})[name] = median(pace)
            if wait.is_named:
                others_s = self._others_s(name, kind)
                answered.append(Late(name, wait.debt, wait.waited_s, others_s))
        return answered

    def _others_s(self, device: str, kind: Owed) -> float | None:
        """Return what the others take for the like, in seconds."""
        others = [s for name, s in self._usual.get(kind, {}).items() if name != device]
        return median(others) if others else None

    def _limit_s(self, late: Late, wait: _Wait) -> float:
        """Return the seconds without progress that are too many for this device."""
        kind = late.debt.kind
        if kind is Owed.RETURN:  # it is the devices' links that bring them back, not their work
            return self.patience_s
        own_s = self.usual_s(late.device, kind) or 0.0
        before_s = wait.worst_s if wait.worst_s > wait.quiet_s else 0.0
        slowest_s = max(own_s, late.others_s or 0.0, before_s)
        doublings = min(self._losses.get(late.device, 0), MOST_DOUBLINGS)
        return max(self.patience_s * float(2**doublings), PACE_FACTOR * slowest_s)


class Waits:
    """Tells whom a run waits for, and goes on without those who keep it waiting for too long."""

    def __init__(
        self,
        config: ServeConfig,
        run: Run,
        gateway: Gateway,
        planner: InForce,
        owed: Callable[[RunState], dict[str, Debt]] = debts,
    ) -> None:
        """Watch over *run*.

        Args:
            config: How long anybody is waited for.
            run: Who is waited for.
            gateway: Knows what arrives from whom.
            planner: Is told who missed a round.
            owed: Returns what the run waits for, by device.
        """
        self._owed = owed
        self._run, self._gateway, self._planner = run, gateway, planner
        self._patience_s, self._deadline_s = config.patience_s, config.round_deadline_s
        self._clock = ProgressClock(config.patience_s)
        self._attempt, self._round_s = 0, 0.0
        self._called_s, self._looked_s = 0.0, 0.0
        self._ready: tuple[int, list[str]] = (-1, [])
        self._lacking_s = 0.0
        self._reminder = Reminder(0.0)
        self._since_s: dict[str, float] = {}
        """When each device that is not ready was first seen so."""

    def look(self, now_s: float, *, is_computing: bool) -> None:
        """Look who is waited for, between two events; where the clock stands still, nobody is.

        Args:
            now_s: Seconds on a clock that never goes back.
            is_computing: Whether it is the coordinator that everybody waits for.
        """
        state = self._run.state
        passed_s, self._called_s = min(now_s - self._called_s, MOST_LOOK_S), now_s
        if state.attempt != self._attempt:
            self._attempt, self._round_s = state.attempt, 0.0
        self._round_s += passed_s
        if is_computing:
            self._clock.pause(now_s)
            return
        passed_s = min(now_s - self._looked_s, MOST_LOOK_S)
        if passed_s < max(LOOK_EVERY_S, LOOK_EACH_S * len(state.ready)):
            return
        self._looked_s = now_s
        owed = self._owed(state)
        moved = {name: self._moved(name) for name in owed}
        found = self._clock.look(now_s, owed, moved, state.ready)
        self._tell(found)
        for late in found.lost:
            self._lose(late)
        if state.is_in_round:
            self._cut()
        self._tell_of_missing(now_s, passed_s)

    def _moved(self, device: str) -> int:
        try:
            return self._gateway.stats(device).num_moved
        except PeerGone:
            return 0

    def _tell(self, found: Look) -> None:
        see, named = self._run.watcher.see, dict[Owed, list[Late]]()
        for late in found.answered:
            see(WaitingOver(self._what(late.debt), late.device, late.seconds))
        for late in found.named:
            named.setdefault(late.debt.kind, []).append(late)
        for group in named.values():
            longest = max(group, key=lambda late: late.seconds)
            names = [late.device for late in group]
            what = self._what(longest.debt)
            see(Waiting(what, names, longest.seconds, longest.others_s))

    def _what(self, debt: Debt) -> str:
        """Return the part of the run that cannot go on without what is owed."""
        _, step, _ = debt.where
        if debt.kind in (Owed.INPUT, Owed.GRADIENT):
            return f"step {step}"
        whole = f"round {nth(self._run.state.round)}"
        return {
            Owed.UPLOAD: f"{whole}: adapters",
            Owed.EVALUATION: f"{whole}: evaluation",
            Owed.RETURN: f"{whole}: devices on their way back",
        }[debt.kind]

    def _lose(self, late: Late) -> None:
        """Go on without a device that does nothing; it joins again when it wakes."""
        if late.debt.kind is Owed.RETURN:
            self._run.stop_waiting([late.device])
            return
        reason = f"hangs: no progress for {late.seconds:.0f} s, although its link lives"
        self._planner.missed(late.device)
        self._run.lose(late.device, reason)
        with suppress(PeerGone):
            self._gateway.forget(late.device, reason)

    # ---- the end of a round ----

    def _cut(self) -> None:
        """Go on without members that hold a round up beyond its deadline, if enough are left."""
        state = self._run.state
        if self._deadline_s is None or self._round_s < self._deadline_s:
            return
        owed = self._owed(state)
        late = owed.keys() & self._clock.late()
        if not late or len(state.members) - len(late) < state.least_members:
            return
        self._run.watcher.see(DevicesCutOff(state.round, sorted(late), self._deadline_s))
        self._run.cut_off.add(late)
        for name in late:
            self._clock.forget(name)
            self._planner.missed(name)

    # ---- before a round ----

    def _tell_of_missing(self, now_s: float, passed_s: float) -> None:
        """Say now and then how many devices a round lacks, and what is known of them."""
        state = self._run.state
        present = set(self._gateway.devices())
        missing = (self._run.gone.keys() | present) - state.ready.keys()
        self._since_s = {name: self._since_s.get(name, now_s) for name in missing}
        here = state.round, sorted(state.ready)
        if state.phase is not Phase.GATHERING or state.awaited or self._has_enough():
            self._ready = (-1, [])
            return
        if here != self._ready:
            self._ready, self._lacking_s = here, -passed_s
            self._reminder = Reminder(min(NAME_AFTER_S, self._patience_s / 4))
        self._lacking_s += passed_s
        if self._reminder.is_due(self._lacking_s):
            why = {name: self._why_not_ready(name, now_s, present) for name in missing}
            least = state.min_devices
            event = DevicesMissing(state.round, here[1], least, why, self._lacking_s)
            self._run.watcher.see(event)

    def _has_enough(self) -> bool:
        return self._run.state.decide() is not Action.WAIT

    def _why_not_ready(self, device: str, now_s: float, present: Container[str]) -> str:
        """Return what is known of a device that is not ready."""
        passed = f"{now_s - self._since_s[device]:.0f} s"
        if device in present:
            return f"has been on its way for {passed}"
        return f"left {passed} ago: {self._run.gone[device]}"
