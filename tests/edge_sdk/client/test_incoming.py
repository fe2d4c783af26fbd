"""A device sorts what it receives: answers, new orders, and ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edge_sdk.client.incoming import Inbox, Redirected, RunEnded, Stopped
from edge_sdk.errors import EdgeError, NumericError, PeerGone, RefusedError
from edge_sdk.protocol.messages import (
    Failure,
    Gradient,
    Pause,
    Probe,
    Refused,
    RoundStart,
    RunOver,
    Stamp,
)
from edge_sdk.transport.memory_link import MemoryLink, memory_pair

NOW = Stamp(run="r", round=1, step=7, attempt=2)


@pytest.fixture
def ends() -> tuple[Inbox, MemoryLink, threading.Event]:
    """A device's inbox, the coordinator's end, and the application's stop."""
    device, coordinator = memory_pair()
    stop = threading.Event()
    return Inbox(device, stop), coordinator, stop


def gradient(micro: int = 0, stamp: Stamp = NOW) -> Gradient:
    """An answer."""
    return Gradient(stamp=stamp, micro=micro, loss_sum=0.0)


def test_stale_answers_are_skipped(ends: Any) -> None:
    """Only the answer with the stamp and micro-batch of the question counts."""
    inbox, coordinator, _ = ends
    old = Stamp(run="r", round=1, step=7, attempt=1)
    for message in (gradient(stamp=old), gradient(0), gradient(1)):
        coordinator.send(message)

    assert inbox.answer(Gradient, NOW, 1).message == gradient(1)


@pytest.mark.parametrize(
    "order", [RoundStart(stamp=NOW, end_step=9, is_full=False), Pause(stamp=NOW)]
)
def test_a_new_order_ends_the_wait(ends: Any, order: Any) -> None:
    """An order in place of an answer is handed up, between two steps as well."""
    inbox, coordinator, _ = ends

    coordinator.send(order)
    with pytest.raises(Redirected) as caught:
        inbox.answer(Gradient, NOW, 0)
    coordinator.send(order)
    with pytest.raises(Redirected):
        inbox.poll()

    assert caught.value.envelope.message == order


def test_an_order_ends_a_measurement_of_the_link_that_heeds_it(ends: Any) -> None:
    """Heeded it is handed up; overheard, the answer behind it counts, and no stale one."""
    inbox, coordinator, _ = ends
    old, new = Stamp(run="r", round=0, step=3, attempt=2), Pause(stamp=NOW)

    coordinator.send(new)
    with pytest.raises(Redirected):
        inbox.reply(Probe, NOW, heeds_orders=True)
    for message in (new, Probe(stamp=old), Probe(stamp=NOW)):
        coordinator.send(message)

    assert inbox.reply(Probe, NOW, heeds_orders=False).message == Probe(stamp=NOW)


def test_an_expected_message_is_found_among_others(ends: Any) -> None:
    """What is not of the kind is ignored."""
    inbox, coordinator, _ = ends
    coordinator.send(gradient())
    coordinator.send(Pause(stamp=NOW))

    assert inbox.expect(Pause).message == Pause(stamp=NOW)


def test_a_poll_does_not_wait(ends: Any) -> None:
    """With nothing there the device goes on."""
    ends[0].poll()


@pytest.mark.parametrize("look", ["next", "poll"])
def test_the_application_may_stop_at_any_time(ends: Any, look: str) -> None:
    """A stop is noticed while waiting and between two steps."""
    inbox, _, stop = ends
    stop.set()

    with pytest.raises(Stopped):
        getattr(inbox, look)()


def test_a_stop_interrupts_a_wait(ends: Any) -> None:
    """A device that waits for the coordinator notices within one poll."""
    inbox, _, stop = ends
    timer = threading.Timer(0.05, stop.set)
    timer.start()

    with pytest.raises(Stopped):
        inbox.next()
    timer.join()


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (Refused(stamp=NOW, reason="unknown key"), RefusedError, "unknown key"),
        (RunOver(stamp=NOW, reason="complete"), RunEnded, "complete"),
        (Failure(stamp=NOW, error="NumericError", text="NaN"), NumericError, "coordinator: NaN"),
        (Failure(stamp=NOW, error="Unheard", text="x"), EdgeError, "coordinator: x"),
        (Failure(stamp=NOW, error="INTERRUPTED_EXIT_CODE", text="x"), EdgeError, "x"),
        (Failure(stamp=NOW, error="annotations", text="x"), EdgeError, "x"),
    ],
)
@pytest.mark.parametrize("look", ["next", "poll"])
def test_ends_are_exceptions(
    ends: Any, look: str, message: Any, error: type[Exception], text: str
) -> None:
    """What ends a session or a run is raised as what it is, wherever it arrives."""
    inbox, coordinator, _ = ends
    coordinator.send(message)

    with pytest.raises(error, match=text):
        getattr(inbox, look)()


def test_a_lost_link_is_raised(ends: Any) -> None:
    """When the other end is gone nobody waits."""
    inbox, coordinator, _ = ends
    coordinator.close()

    with pytest.raises(PeerGone):
        inbox.next()
