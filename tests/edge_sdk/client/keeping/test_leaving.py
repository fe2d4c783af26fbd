"""A device that was told to stop leaves when it may, and in time whatever comes of that."""

from __future__ import annotations

import threading
import time

import pytest

from edge_sdk.client.incoming import Stopped
from edge_sdk.client.keeping.leaving import LEAVE_S, Leaving


def test_outside_of_a_round_a_device_leaves_at_once() -> None:
    """Nobody is asked; nor is a coordinator that knows of no such wish, or that has answered."""
    stop = threading.Event()
    leaving, asked = Leaving(stop), list[str]()
    leaving.look()  # nothing is wanted
    stop.set()

    for _ in range(2):
        with pytest.raises(Stopped):
            leaving.look()
        leaving.enter_round(lambda: asked.append("asked"))
        leaving.leave_round()

    assert asked == []


def test_in_a_round_it_asks_once_and_waits_for_some_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The coordinator gets so many seconds to let it save itself; then it leaves all the same."""
    now_s, stop, asked = [100.0], threading.Event(), list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    leaving = Leaving(stop)
    leaving.enter_round(lambda: asked.append(now_s[0]))
    stop.set()

    leaving.look()
    now_s[0] += LEAVE_S - 0.1
    leaving.look()
    now_s[0] += 0.2

    with pytest.raises(Stopped):
        leaving.look()
    assert asked == [100.0]
