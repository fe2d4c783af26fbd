"""Devices join, leave, and do something else than before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from coordinator.results.events.event import RunEvent


@dataclass(frozen=True, slots=True)
class MessageRejected(RunEvent):
    """A packet of a device could not be read."""

    LINE = "{0.device}: rejected: {0.error}"

    device: str
    error: str


@dataclass(frozen=True, slots=True)
class DeviceEnrolled(RunEvent):
    """A device has had its key registered; it has not joined yet."""

    LINE = "{0.device}: enrolled from {0.address}, with the key {0.fingerprint}"

    device: str
    fingerprint: str
    address: str


@dataclass(frozen=True, slots=True)
class DeviceEvent(RunEvent):
    """A device joined, left, or does something else than before."""

    LINE = "{0.device}: {0.doing}"
    DOING: ClassVar[str] = ""
    """What it does now, in a few words, `0` being the event."""

    device: str

    @property
    def doing(self) -> str:
        """What it does now, in a few words."""
        return self.DOING.format(self)


@dataclass(frozen=True, slots=True)
class DeviceStatus(DeviceEvent):
    """A device is on its way to a round."""

    DOING = "{0.status}"

    status: str
    is_delay: bool = False
    """Whether the run, or the device, is the later for it."""


@dataclass(frozen=True, slots=True)
class DeviceJoined(DeviceEvent):
    """A device is ready to train."""

    DOING = "ready"

    split: int
    """Blocks that it holds."""
    samples: int
    """Training samples that it has."""
    left_out: int = 0
    """Rows that it skips or drops."""
    cut: int = 0
    """Samples that it cuts."""

    @property
    def doing(self) -> str:
        """What it does now, and how many of its rows it does not take as they stand."""
        parts = {"rows left out": self.left_out, "samples cut": self.cut}
        lost = [f"{count:,} {what}" for what, count in parts.items() if count]
        return ", ".join([self.DOING, *lost])


@dataclass(frozen=True, slots=True)
class DeviceLeft(DeviceEvent):
    """A device that was ready to train, or on its way to it, is gone."""

    DOING = "left: {0.reason}"

    reason: str
