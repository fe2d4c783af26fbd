"""A slow link is never taken for a dead one, and a dead one is noticed in bounded time."""

from __future__ import annotations

import pytest

from edge_sdk.protocol.channel import Sender
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.pulse import MOST, Pulse

BEAT_S = LinkConfig(address="").beat_s
LIFELESS_S = LinkConfig(address="").lifeless_s
KIB = 1024


class Chunks:
    """A message of equal chunks."""

    def __init__(self, num_packets: int, size: int) -> None:
        self.num_packets, self._size = num_packets, size

    def packet_bytes(self, number: int) -> int:
        """Return the size of a chunk."""
        return self._size


SLOW = {
    # link: (bytes a second, bytes of a chunk, bytes of the message, other devices on it)
    "10 Mbit/s, 8 MB": (1_250_000, 1024 * KIB, 8_000_000, 0),
    "256 kbit/s, chunks of 256 KiB": (32_000, 256 * KIB, 2_000_000, 0),
    "256 kbit/s, shared by two": (32_000, 256 * KIB, 2_000_000, 1),
    "64 kbit/s, chunks of 64 KiB": (8_000, 64 * KIB, 500_000, 0),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_link_trips_no_timer(name: str) -> None:
    """Heartbeats wait behind megabytes, acks come chunk by chunk: nothing is taken for lost."""
    rate, chunk, total, others = SLOW[name]
    sender, pulse = Sender(), Pulse(LIFELESS_S)
    sender.queue(Chunks(-(-total // chunk), chunk), 0)
    arrivals: list[tuple[float, int]] = []  # of packets at the other side: when, which
    free_at_s = next_beat_s = now_s = 0.0
    while not sender.is_idle:
        while (due := sender.peek(now_s)) is not None:
            sender.sent(due)
            free_at_s = max(free_at_s, now_s) + due.size * (1 + others) / rate
            arrivals.append((free_at_s, due.seq))
        if now_s >= next_beat_s:  # its answer comes after all that stands before it
            next_beat_s += BEAT_S
            pulse.ask(now_s)
        while arrivals and arrivals[0][0] <= now_s:
            _, seq = arrivals.pop(0)
            sender.on_ack(seq + 1, 1 << 40, now_s)
            pulse.hear(now_s)
        assert not sender.is_stuck(now_s), now_s
        assert not pulse.is_gone(now_s), now_s
        now_s += 0.25


def test_chunks_too_large_for_the_link_arrive_nonetheless() -> None:
    """A chunk of 1 MiB takes 33 s on 256 kbit/s: the patience grows until it is enough."""
    size, rate = 1024 * KIB, 32_000
    sender, now_s, rewinds = Sender(), 0.0, 0
    sender.queue(Chunks(8, size), 0)
    arrives_s = {}
    while not sender.is_idle:
        while (due := sender.peek(now_s)) is not None:
            sender.sent(due)
            begin_s = max([now_s, *arrives_s.values()])
            arrives_s[due.seq] = begin_s + size / rate
        if sender.is_stuck(now_s):  # a new connection, which begins with an empty queue
            rewinds += 1
            sender.rewind()
            arrives_s.clear()
            continue
        for seq, at_s in list(arrives_s.items()):
            if at_s <= now_s:
                del arrives_s[seq]
                sender.on_ack(seq + 1, 1 << 40, now_s)
        now_s += 0.25
        assert now_s < 600.0

    assert rewinds == 1


def test_a_dead_link_is_noticed_in_time() -> None:
    """Whenever it dies: at most a beat and the least patience later, also after many answers."""
    pulse = Pulse(LIFELESS_S)
    for beat in range(100):
        pulse.ask(beat * BEAT_S)
        pulse.hear(beat * BEAT_S + 0.1)
    died_s = 99 * BEAT_S + 0.2

    pulse.ask(100 * BEAT_S)
    pulse.ask(101 * BEAT_S)

    assert not pulse.is_gone(100 * BEAT_S + LIFELESS_S - 0.1)
    assert pulse.is_gone(died_s + BEAT_S + LIFELESS_S)
    assert not pulse.is_gone(1e9)  # until somebody is asked again


def borne_s(pulse: Pulse, now_s: float) -> float:
    """Return after how many seconds without an answer the pulse is gone."""
    pulse.ask(now_s)
    return next(s for s in range(1000) if pulse.is_gone(now_s + s))


def answered(pulse: Pulse, after_s: float, times: int = 1) -> None:
    """Ask and hear."""
    for _ in range(times):
        pulse.ask(0.0)
        pulse.hear(after_s)


def test_patience_grows_with_slow_answers_and_wears_off() -> None:
    """It stays between the least and `MOST` times the least."""
    pulse = Pulse(10.0)
    answered(pulse, 8.0)
    assert borne_s(pulse, 0.0) == 24
    answered(pulse, 99.0)
    assert borne_s(pulse, 0.0) == MOST * 10.0
    answered(pulse, 0.1, times=3)
    assert borne_s(pulse, 0.0) == 10


def test_a_new_connection_is_borne_longer_until_it_has_answered_quickly() -> None:
    """Else a chunk that takes longer than the least patience would never arrive."""
    pulse = Pulse(10.0)

    assert [borne_s(pulse, 0.0), borne_s(pulse, 0.0), borne_s(pulse, 0.0)] == [10, 20, 40]
    answered(pulse, 0.1, times=3)
    assert borne_s(pulse, 0.0) == 10


def test_nobody_is_blamed_for_our_own_sleep() -> None:
    """A question whose answer could not be heard, as this machine slept, does not count."""
    pulse = Pulse(10.0)
    pulse.ask(0.0)
    pulse.rest()

    assert not pulse.is_gone(1000.0)
