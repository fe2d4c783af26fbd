"""What counters that begin at 0 with every session come to over a run; nobody else adds them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

N = TypeVar("N", int, float)

# Names of the counters of all bytes, beside those of their kinds.
UP, DOWN = "bytes_up", "bytes_down"


class SessionCounters(Generic[N]):
    """Sums of counters by device, over its sessions and over restarts of the coordinator.

    What counts on over sessions already passes through unchanged: sums may be summed again.
    """

    def __init__(self) -> None:
        self._before: dict[str, dict[str, N]] = {}
        """Sums of the sessions that are over, by device and counter."""
        self._now: dict[str, dict[str, N]] = {}
        """What the session that goes on had counted at the last look."""
        self._sessions: dict[str, str] = {}
        """Which session that is."""

    def take(self, device: str, counts: Mapping[str, N], session: str = "") -> dict[str, N]:
        """Return the sums over the run, the *counts* of the session that goes on included.

        Another *session* than the one before begins at 0, and so does one with a lower count.
        """
        before, now = self._before.setdefault(device, {}), self._now.setdefault(device, {})
        is_another = self._sessions.setdefault(device, session) != session
        if is_another or any(count < now.get(name, 0) for name, count in counts.items()):
            before |= {name: before.get(name, 0) + count for name, count in now.items()}
            now.clear()
        self._sessions[device] = session
        now.update(counts)
        return self.sums(device)

    def sums(self, device: str) -> dict[str, N]:
        """Return the sums over the run at the last look."""
        before, now = self._before.get(device, {}), self._now.get(device, {})
        return {n: before.get(n, 0) + now.get(n, 0) for n in {**before, **now}}

    def total(self, name: str) -> N:
        """Return the sum of a counter over all devices."""
        total: N = 0
        for device in self._before:
            total += self._before[device].get(name, 0) + self._now.get(device, {}).get(name, 0)
        return total

    def facts(self) -> dict[str, dict[str, N]]:
        """Return the sums of all devices, also of those that are not there, for a checkpoint."""
        return {device: self.sums(device) for device in sorted(self._before)}

    def load(self, facts: Mapping[str, Mapping[str, N]]) -> None:
        """Go on from what `facts` returned; all sessions are new ones."""
        self._before = {device: dict(counts) for device, counts in facts.items()}
        self._now, self._sessions = {}, {}
