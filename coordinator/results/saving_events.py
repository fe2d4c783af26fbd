"""How a round is saved on its way, as values. What every run meets is in `events.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.results.events import RoundEvent


@dataclass(frozen=True, slots=True)
class RoundSaved(RoundEvent):
    """A round is saved in mid-way, by the coordinator and by all of its members."""

    step: int
    """First step that is to be done from there."""
    seconds: float
    """What it took."""


@dataclass(frozen=True, slots=True)
class RoundUnsaved(RoundEvent):
    """Members did not save themselves in time; the last checkpoint counts."""

    LINE = "round {0.nth}: not saved at step {0.step}: no answer from {0.names}"

    step: int
    devices: Sequence[str]
    """Who did not."""

    @property
    def names(self) -> str:
        """Who did not, as text."""
        return ", ".join(self.devices)


@dataclass(frozen=True, slots=True)
class RoundHeld(RoundEvent):
    """A round is saved, and goes on from there once devices that have left are back."""

    LINE = "round {0.nth} is saved at step {0.step} and waits for {0.names}"

    step: int
    devices: Sequence[str]

    @property
    def names(self) -> str:
        """Who is waited for."""
        return ", ".join(self.devices)
