"""Waves between their forward and their backward half: what is awaited of them, which are whole.

Pure. What goes through all places would cost a fleet of a thousand the square of that in a step, so
everything is counted as it happens.
"""

from __future__ import annotations

import heapq
from collections.abc import Container
from dataclasses import dataclass, field

from edge_sdk.protocol.plan import Place


@dataclass
class Away:
    """The waves that are away, and what has come back of them."""

    waves: dict[int, list[Place]] = field(default_factory=dict)
    """By number, in their order; those that went forward together go back together."""
    returned: set[Place] = field(default_factory=set)
    """Places whose gradients are here."""
    _wave_of: dict[Place, int] = field(default_factory=dict)
    _waves_of: dict[str, list[int]] = field(default_factory=dict)
    """Wave of each place of a device, in their order."""
    _lacking: dict[int, int] = field(default_factory=dict)
    """Gradients that a wave still waits for."""
    _whole: list[int] = field(default_factory=list)
    """Heap of waves that wait for none; some are over."""
    _count: int = 0

    def __contains__(self, place: Place) -> bool:
        return place in self._wave_of

    @property
    def devices(self) -> Container[str]:
        """The devices of which anything is away."""
        return self._waves_of

    def send(self, places: list[Place]) -> None:
        """Let a wave go."""
        self._count += 1
        number = self._count
        self.waves[number], self._lacking[number] = places, len(places)
        for place in places:
            self._wave_of[place] = number
            self._waves_of.setdefault(place[0], []).append(number)

    def come_back(self, place: Place) -> None:
        """Note that the gradient of a place is here."""
        if place in self._wave_of and place not in self.returned:
            self.returned.add(place)
            self._lack_less(self._wave_of[place])

    def remove(self, place: Place) -> None:
        """Let a place be away no more, as it is answered or its device has left."""
        number, device = self._wave_of.pop(place), place[0]
        self._waves_of[device].remove(number)
        if not self._waves_of[device]:
            del self._waves_of[device]
        self.waves[number].remove(place)
        if place not in self.returned:
            self._lack_less(number)
        self.returned.discard(place)
        if not self.waves[number]:
            del self.waves[number], self._lacking[number]

    def _lack_less(self, number: int) -> None:
        self._lacking[number] -= 1
        if not self._lacking[number]:
            heapq.heappush(self._whole, number)

    def oldest_whole(self) -> list[Place]:
        """Return the oldest wave that can go back; a device gets its answers in their order."""
        while self._whole and self._whole[0] not in self.waves:
            heapq.heappop(self._whole)
        if self._whole and self._is_next(self._whole[0]):
            return self.waves[self._whole[0]]
        numbers = sorted(number for number in self._whole if number in self.waves)
        return next((self.waves[number] for number in numbers if self._is_next(number)), [])

    def _is_next(self, number: int) -> bool:
        """Return whether all devices of a wave have nothing in an earlier one."""
        return all(self._waves_of[device][0] == number for device, _ in self.waves[number])
