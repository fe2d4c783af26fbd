"""Measuring a link: its arithmetic on a clock of its own, and the limits of the other side."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import numpy as np
import pytest

from coordinator.gateway.link_probe import Probing
from edge_sdk.client.incoming import Inbox
from edge_sdk.client.link_speed import LinkSpeed, probe
from edge_sdk.client.states import State
from edge_sdk.deadline import Deadline
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import MAX_PROBE_BYTES, MAX_PROBES, Message, Probe, Stamp
from edge_sdk.transport.link import NO_TENSORS, LinkStats
from edge_sdk.transport.memory_link import MemoryLink, memory_pair

STAMP = Stamp(run="run-1", device="a")
MBIT = 1e6 / 8


class Desk:
    """The coordinator's end of a link in memory, as its gateway."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.probing = Probing(self)  # type: ignore[arg-type]
        self.probing.begin("a")

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Send to the one device there is."""
        assert device == "a"
        self._link.send(message, tensors)

    def answer(self) -> Envelope:
        """Take one message and answer it."""
        envelope = self._link.receive(Deadline.after(0.0))
        self.probing.answer("a", envelope)
        return envelope


class TimedLink:
    """A device's link on which time passes as on a real one: a round trip, and so much a byte."""

    def __init__(self, round_trip_s: float, up: float, down: float) -> None:
        self._device, coordinator = memory_pair()
        self._desk = Desk(coordinator)
        self._speed = LinkSpeed(round_trip_s, up, down)
        self.now_s = 0.0
        self.sizes: list[tuple[int, int]] = []

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Send, have it answered, and let the time pass that this takes."""
        assert isinstance(message, Probe)
        up = tensors["data"][0].size if tensors else 0
        self.sizes.append((up, message.answer_bytes))
        self._device.send(message, tensors)
        self._desk.answer()
        _, up_speed, down_speed = self._speed
        self.now_s += self._speed.round_trip_s + up / up_speed + message.answer_bytes / down_speed

    def receive(self, deadline: Deadline) -> Envelope:
        """Return the answer."""
        return self._device.receive(deadline)

    def set_limit(self, max_message_bytes: int) -> None:
        """Change nothing."""

    def stats(self) -> LinkStats:
        """Return what the link has done."""
        return self._device.stats()

    def close(self, flush_s: float = 0.0) -> None:
        """Close it."""
        self._device.close(flush_s)


def measured(link: TimedLink) -> LinkSpeed:
    """What a device finds out about *link*."""
    return probe(
        link, Inbox(link, threading.Event(), State.PROFILING), STAMP, clock=lambda: link.now_s
    )


@pytest.mark.parametrize(
    ("round_trip_s", "down", "up"),
    [
        (0.0003, 940 * MBIT, 940 * MBIT),
        (0.005, 200 * MBIT, 150 * MBIT),
        (0.055, 40 * MBIT, 10 * MBIT),
        (0.150, 1.6 * MBIT, 0.75 * MBIT),
        (0.300, 0.75 * MBIT, 0.25 * MBIT),
    ],
)
def test_the_speed_of_a_link_is_found(round_trip_s: float, down: float, up: float) -> None:
    """From a local network to 3G: round trip and both bandwidths as they are."""
    found = measured(TimedLink(round_trip_s, up, down))

    assert found == pytest.approx((round_trip_s, up, down), rel=1e-6)


def test_sizes_stop_growing_once_a_transfer_takes_long() -> None:
    """Nothing is four times larger than what has already taken half a second."""
    slow, fast = TimedLink(0.1, 20_000.0, 10_000.0), TimedLink(0.001, 1e9, 1e9)
    measured(slow)
    measured(fast)

    assert slow.sizes == [*[(0, 0)] * 4, (4096, 0), (16384, 0), (0, 4096)]
    assert slow.now_s < 5.0
    assert max(fast.sizes) == (MAX_PROBE_BYTES, 0)
    assert fast.sizes.count((0, MAX_PROBE_BYTES)) == 3
    assert 2 * len(fast.sizes) <= MAX_PROBES


def test_a_link_faster_than_the_clock_has_a_speed() -> None:
    """Where a transfer takes no longer than a round trip, the difference of the two is noise."""
    link = TimedLink(0.010, math.inf, math.inf)

    found = measured(link)

    bound = pytest.approx(MAX_PROBE_BYTES / (0.1 * 0.010))
    assert found == (pytest.approx(0.010), bound, bound)


def test_a_short_answer_is_the_coordinators_mistake() -> None:
    """Bytes that did not come back must not become bandwidth."""
    device, coordinator = memory_pair()
    for _ in range(4):
        coordinator.send(Probe(stamp=STAMP), {"data": (np.zeros(3, np.uint8), "uint8")})

    with pytest.raises(RemoteProtocolError, match="3 bytes came back, 0 were asked for"):
        probe(device, Inbox(device, threading.Event(), State.PROFILING), STAMP)


# ---- the other side ------------------------------------------------------------------------------


def test_the_answer_is_as_large_as_asked_for() -> None:
    """And carries the stamp of the question."""
    device, coordinator = memory_pair()
    desk = Desk(coordinator)
    for size in (0, 1, MAX_PROBE_BYTES):
        device.send(Probe(stamp=STAMP, answer_bytes=size))
        desk.answer()
        answer = device.receive(Deadline.after(0.0))

        assert answer.message == Probe(stamp=STAMP)
        assert sum(tensor.nbytes for tensor in answer.tensors.values()) == size


@pytest.mark.parametrize("size", [-1, MAX_PROBE_BYTES + 1, 2**62])
def test_too_much_is_refused(size: int) -> None:
    """Nobody makes the coordinator send more than a probe needs."""
    device, coordinator = memory_pair()
    device.send(Probe(stamp=STAMP, answer_bytes=size))

    with pytest.raises(RemoteProtocolError, match=f"answer_bytes is {size}, at most"):
        Desk(coordinator).answer()


def test_too_often_is_refused_until_the_next_session() -> None:
    """A device may measure a few times in a round; a new Hello gives it new probes."""
    device, coordinator = memory_pair()
    desk = Desk(coordinator)
    for _ in range(MAX_PROBES + 1):
        device.send(Probe(stamp=STAMP))
    for _ in range(MAX_PROBES):
        desk.answer()

    with pytest.raises(RemoteProtocolError, match="more than 48 probes in a round"):
        desk.answer()
    desk.probing.begin("a")
    device.send(Probe(stamp=STAMP))
    desk.answer()


def test_a_stranger_is_not_answered() -> None:
    """Who has not said Hello has nothing to measure."""
    _, coordinator = memory_pair()
    probing = Probing(Desk(coordinator))  # type: ignore[arg-type]

    with pytest.raises(RemoteProtocolError, match="Probe before Hello"):
        probing.answer("b", Envelope(Probe(stamp=STAMP), {}))
