"""Draw the devices of a round from those that are ready, likelier ones first; pure.

Weighted sampling without replacement by one number for each device (Efraimidis and Spirakis, 2006):
the round takes the devices with the smallest -ln(u) / w. What u is depends on the seed, the round
and the device's name alone, so that who else is there changes nobody's chance order; w is its
availability. docs/method.md, Client selection.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_BITS = 53
"""Of a float's mantissa: so many of a hash make a number between 0 and 1."""


@dataclass
class Attendance:
    """What is known of a device."""

    rounds: int = 0
    """That have ended since it was first there."""
    there: int = 0
    """At whose start it was ready."""
    drawn: int = 0
    """That it was drawn for."""
    finished: int = 0
    """Of these, whose result has something of it."""

    @property
    def availability(self) -> float:
        """The chance that it is there, times that of finishing a round; docs/method.md."""
        return (self.there + 1) / (self.rounds + 2) * (self.finished + 1) / (self.drawn + 2)


@dataclass
class Selection:
    """Who is drawn, round after round."""

    per_round: int | None
    """Devices of a round; None: all that are ready."""
    seed: int
    _known: dict[str, Attendance] = field(default_factory=dict)
    _there: set[str] = field(default_factory=set)
    """Devices that were ready for the round that is not over."""
    _drawn: set[str] = field(default_factory=set)
    """Devices that were drawn for it, those of earlier attempts included."""

    def draw(self, round_: int, ready: Collection[str], fit: Collection[str]) -> list[str]:
        """Return the devices of a round, sorted.

        One that is begun again has the devices that it had, as far as they are fit; others come in
        the place of those that are not.

        Args:
            round_: The round, from 0.
            ready: All who are here.
            fit: Those of them that may be in the round.
        """
        if self.per_round is None:
            return sorted(fit)
        self._there |= set(ready)
        order = sorted(fit, key=lambda name: (name not in self._drawn, self._key(round_, name)))
        found = order[: self.per_round]
        self._drawn |= set(found)
        return sorted(found)

    def ended(self, finished: Collection[str]) -> None:
        """Take note that the round is over, and whose part is in its result."""
        if self.per_round is None:
            return
        for name in self._there - self._known.keys():
            self._known[name] = Attendance()
        for name, one in self._known.items():
            one.rounds += 1
            one.there += name in self._there
            one.drawn += name in self._drawn
            one.finished += name in finished
        self._there, self._drawn = set(), set()

    def _key(self, round_: int, name: str) -> float:
        drawn = hashlib.blake2b(f"{self.seed}:{round_}:{name}".encode(), digest_size=8).digest()
        uniform = ((int.from_bytes(drawn, "big") >> (64 - _BITS)) + 0.5) / 2**_BITS
        return -math.log(uniform) / self._known.get(name, Attendance()).availability

    # ---- checkpoints ----

    def facts(self) -> dict[str, Any]:
        """Return everything that a restart needs, as JSON can hold it; empty where all are in."""
        if self.per_round is None:
            return {}
        return {
            "known": {name: asdict(one) for name, one in sorted(self._known.items())},
            "there": sorted(self._there),
            "drawn": sorted(self._drawn),
        }

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Take over what `facts` returned."""
        self._known = {name: Attendance(**one) for name, one in facts.get("known", {}).items()}
        self._there = set(facts.get("there", ()))
        self._drawn = set(facts.get("drawn", ()))
