"""How fast the link to the coordinator is: round trip and bandwidth each way, measured on it.

Uses the run's own connection, so encryption, chunks and acks are part of the result. Costs at most
a few MiB, and about a second each way on a slow link.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from edge_sdk.client.incoming import Inbox
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import MAX_PROBE_BYTES, Probe, Stamp
from edge_sdk.transport.link import NO_TENSORS, Link

FIRST_BYTES = 4 * 1024
GROWTH = 4
# A transfer of this length is long beside any round trip; a larger one would only cost time.
ENOUGH_S = 0.5
ROUND_TRIPS = 4
# Transfers of the largest size; the fastest counts, as other traffic only makes one slower.
REPEATS = 3
# Less of a transfer than this, beside its round trip, is noise and would be a speed without bound.
LEAST_SHARE = 0.1

Clock = Callable[[], float]


class LinkSpeed(NamedTuple):
    """What a device found out about its link."""

    round_trip_s: float
    """Seconds for a small message there and back."""
    up_bytes_per_s: float
    """Bandwidth from the device to the coordinator."""
    down_bytes_per_s: float


def probe(
    link: Link,
    inbox: Inbox,
    stamp: Stamp,
    clock: Clock = time.perf_counter,
) -> LinkSpeed:
    """Measure the link, after Welcome and while nothing else travels on it.

    Args:
        link: The connection.
        inbox: What arrives on it; its state says whether a new order ends the measurement.
        stamp: The device's stamp.
        clock: Seconds, for tests.

    Raises:
        EdgeError: The coordinator refuses, or the session is lost.
        Redirected: A new order came in between.
    """

    def seconds(up_bytes: int, down_bytes: int) -> float:
        began = clock()
        _send(link, stamp, up_bytes, down_bytes)
        answer = inbox.wait_for_reply(Probe, stamp)
        _check(answer, down_bytes)
        return clock() - began

    round_trip_s = min(seconds(0, 0) for _ in range(ROUND_TRIPS))
    up = _bandwidth(lambda size: seconds(size, 0), round_trip_s)
    down = _bandwidth(lambda size: seconds(0, size), round_trip_s)
    return LinkSpeed(round_trip_s, up, down)


def _send(link: Link, stamp: Stamp, up_bytes: int, down_bytes: int) -> None:
    tensors: Mapping[str, TensorOut] = NO_TENSORS
    if up_bytes:
        tensors = {"data": (np.zeros(up_bytes, np.uint8), "uint8")}
    link.send(Probe(stamp=stamp, answer_bytes=down_bytes), tensors)


def _check(answer: Envelope, down_bytes: int) -> None:
    got = answer.tensors["data"].size if "data" in answer.tensors else 0
    if got != down_bytes:
        raise RemoteProtocolError(f"Probe: {got} bytes came back, {down_bytes} were asked for")


def _bandwidth(seconds: Callable[[int], float], round_trip_s: float) -> float:
    """Return bytes a second, from the largest transfer that does not take too long."""
    size = FIRST_BYTES
    taken_s = seconds(size)
    while taken_s < ENOUGH_S and size < MAX_PROBE_BYTES:
        size = min(GROWTH * size, MAX_PROBE_BYTES)
        taken_s = seconds(size)
    if taken_s < ENOUGH_S:
        taken_s = min([taken_s, *(seconds(size) for _ in range(REPEATS - 1))])
    # A small message needs the round trip as well: that is no matter of bandwidth.
    return size / max(taken_s - round_trip_s, LEAST_SHARE * taken_s)
