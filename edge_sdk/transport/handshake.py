"""A CURVE handshake and nothing more: are both keys right, and does a coordinator answer?

It opens no session, so that one which this device's key has open elsewhere goes on. Not here: what
the outcome means for people (`doctor/link.py`).
"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

import zmq

from edge_sdk.deadline import Deadline
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import packets
from edge_sdk.protocol.messages import FROM_COORDINATOR
from edge_sdk.protocol.packets import Lane
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.connection import Line
from edge_sdk.transport.link import LinkConfig, package_version
from edge_sdk.transport.sockets import receive_frame

# A coordinator with another key closes every connection; a single drop may be chance.
ENOUGH_DROPS = 2
POLL_MS = 100


class Handshake(NamedTuple):
    """Outcome of a handshake."""

    is_up: bool
    """Both keys were accepted."""
    refused: int | None
    """Status of the coordinator's refusal of our key, 400 for an unknown one; None without."""
    drops: int
    """Number of connections that ended before the keys were accepted."""
    round_trip_s: float | None
    """Seconds until the coordinator answered a control frame; None if it did not."""


def shake_hands(config: LinkConfig, timeout_s: float) -> Handshake:
    """Connect with the keys of *config*, ask one question that changes nothing, and leave.

    Raises:
        ConfigError: the address is not valid.
    """
    deadline, poller = Deadline.after(timeout_s), zmq.Poller()
    context: zmq.Context[zmq.Socket[bytes]]
    with zmq.Context() as context:
        line = Line(context, poller, config, config.keys, Lane.CONTROL)
        try:
            return _shake(line, poller, deadline)
        finally:
            line.close()


def _shake(line: Line, poller: zmq.Poller, deadline: Deadline) -> Handshake:
    session, drops, asked_s = secrets.token_hex(16), 0, 0.0
    while not deadline.has_passed() and drops < ENOUGH_DROPS:
        ready = dict(poller.poll(POLL_MS))
        if line.monitor in ready:
            for event, value in line.news():
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    return Handshake(False, value, drops, None)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    asked_s = time.perf_counter()
                    line.put(_question(session))
                drops += event == zmq.EVENT_DISCONNECTED
        if line.socket in ready and _is_answer(line, session):
            return Handshake(True, None, drops, time.perf_counter() - asked_s)
    return Handshake(line.is_up, None, drops, None)


def _question(session: str) -> bytes:
    """Return an attach to a session that the coordinator cannot know: it opens none and says so."""
    nothing = Conversation(session, packets.MAX_FRAME_BYTES, FROM_COORDINATOR).ack()
    return packets.control_frame(
        packets.Attach(
            session=session, is_resumed=True, sdk_version=package_version(), name="", ack=nothing
        )
    )


def _is_answer(line: Line, session: str) -> bool:
    frame = receive_frame(line.socket)
    if frame is None:
        return False
    try:
        control = packets.control_in(frame.buffer)
    except RemoteProtocolError:
        return False
    return isinstance(control, packets.UnknownSession) and control.session == session
