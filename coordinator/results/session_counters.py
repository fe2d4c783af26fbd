"""Bytes of a device over all of its sessions in a run; each session counts from 0."""

from __future__ import annotations

from collections.abc import Mapping


class SessionCounters:
    """What a device's counters come to, over sessions and restarts of the coordinator."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, int]] = {}
        """Sums of the sessions that are over, by device and counter."""
        self._now: dict[str, dict[str, int]] = {}
        """What the session that goes on had counted at the last look."""

    def take(self, device: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the sums over the run, the *counts* of the session that goes on included.

        A count below the one before is that of another session.
        """
        before, now = self._before.setdefault(device, {}), self._now.setdefault(device, {})
        if any(count < now.get(name, 0) for name, count in counts.items()):
            for name, count in now.items():
                before[name] = before.get(name, 0) + count
            now.clear()
        now.update(counts)
        return {name: before.get(name, 0) + count for name, count in now.items()}

    def facts(self) -> dict[str, dict[str, int]]:
        """Return the sums, for a checkpoint."""
        return {device: self.take(device, {}) for device in self._now}

    def load(self, facts: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what `facts` returned; all sessions are new ones."""
        self._before = {device: dict(counts) for device, counts in facts.items()}
        self._now = {}
