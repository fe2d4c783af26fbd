"""What is on its way arrives in the order of its times, and a device's events in their own."""

from __future__ import annotations

from coordinator.gateway.interface import Joined, Left
from coordinator.lab.simulation.arrivals import Arrivals


def test_events_arrive_by_time_and_name() -> None:
    """The earliest first, then by name; nothing before its time."""
    arrivals = Arrivals()
    arrivals.add("b", [Joined("b", "1"), Left("b")], [1.0, 3.0])
    arrivals.add("a", [Joined("a", "1")], [1.0])

    assert arrivals.first_s() == 1.0
    assert arrivals.until(0.5) == []
    assert arrivals.until(2.0) == [Joined("a", "1"), Joined("b", "1")]
    assert arrivals.until(3.0) == [Left("b")]
    assert not arrivals


def test_a_device_is_not_overtaken_by_itself() -> None:
    """What has no time of its own, or an earlier one, comes after what was sent before."""
    arrivals = Arrivals()
    arrivals.add("a", [Joined("a", "1"), Left("a", "x")], [2.0, 1.0])
    arrivals.add("a", [Left("a", "y")], [])

    assert arrivals.until(1.9) == []
    assert arrivals.until(2.0) == [Joined("a", "1"), Left("a", "x"), Left("a", "y")]
