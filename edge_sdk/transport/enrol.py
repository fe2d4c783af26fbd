"""Redeem an enrolment code: have this device's key registered, in one short connection.

The connection has the one-time keys of the code. They prove to the coordinator that somebody has
the code, and its key in the code proves to us that it is the coordinator: nothing else is trusted.
Not here: what is in a code (`enrol_code.py`), where the device's key lies (`edge_sdk/enrol.py`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import zmq

from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, PeerGone, RefusedError, RemoteProtocolError, public_text
from edge_sdk.protocol import packets
from edge_sdk.protocol.packets import Lane
from edge_sdk.transport.addresses import parse_address
from edge_sdk.transport.connection import Line
from edge_sdk.transport.enrol_code import EnrolCode, one_time_keys
from edge_sdk.transport.link import LinkConfig, package_version
from edge_sdk.transport.sockets import receive_frame

ANSWER_S = 12.0
"""Seconds for all of it; a round trip takes a second on the slowest links."""
# What may pass in a moment: another process that is changing the list, or a disk.
REFUSALS, AGAIN_S = 3, 0.6
POLL_MS = 100
# Between two looks whether somebody listens.
LISTEN_S = 1.0
DIAL_S = 5.0
_NOT_KNOWN = (
    "the coordinator does not know this code: a newer one was made for the device, it was made "
    "long ago, or with another allow-list than that of the coordinator which serves now"
)


def redeem(
    code: EnrolCode,
    public_key: str,
    timeout_s: float = ANSWER_S,
    wait_s: float = 0.0,
    tell: Callable[[str], object] = lambda _: None,
) -> str:
    """Have *public_key* registered; return the name under which it is.

    A second time with the same key changes nothing, and is answered likewise while the key is
    registered. Nothing is written on this device.

    Args:
        code: The code as it was read.
        public_key: This device's own.
        timeout_s: Seconds for an answer.
        wait_s: Seconds before that for a coordinator that does not listen yet.
        tell: Is told, in a line, that it is waited for.

    Raises:
        ConfigError: the address in the code cannot be dialled.
        RefusedError: the coordinator does not take the code, or not this key; it says why.
        PeerGone: nobody answers, or somebody who has not the key of the coordinator.
    """
    _wait_for(code.address, min(DIAL_S, timeout_s), wait_s, tell)
    deadline, refused = Deadline.after(timeout_s), 0
    while True:
        try:
            return _ask(code, public_key, deadline)
        except _Unknown as error:
            refused += 1
            if refused >= REFUSALS or deadline.left_s() < AGAIN_S:
                raise RefusedError(str(error)) from None
        time.sleep(AGAIN_S)


class _Unknown(RefusedError):
    """The same may go well in a moment."""


def _ask(code: EnrolCode, public_key: str, deadline: Deadline) -> str:
    config = LinkConfig(address=code.address, server_key=code.server_key)
    poller = zmq.Poller()
    context: zmq.Context[zmq.Socket[bytes]]
    with zmq.Context() as context:
        line = Line(context, poller, config, one_time_keys(code), Lane.CONTROL)
        try:
            return _answer(line, poller, public_key, deadline, code.address)
        finally:
            line.close()


def _answer(
    line: Line, poller: zmq.Poller, public_key: str, deadline: Deadline, address: str
) -> str:
    question = packets.Enrol(key=public_key, sdk_version=package_version())
    while not deadline.has_passed():
        ready = dict(poller.poll(POLL_MS))
        if line.monitor in ready:
            for event, _ in line.news():
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    raise _Unknown(_NOT_KNOWN)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    line.put(packets.control_frame(question))
        if line.socket in ready:
            name = _read(line)
            if name is not None:
                return name
    raise _no_answer(line, address)


def _read(line: Line) -> str | None:
    """Return the name in an answer; None for what is no answer."""
    frame = receive_frame(line.socket)
    if frame is None:
        return None
    try:
        control = packets.control_in(frame.buffer)
    except RemoteProtocolError:
        return None
    if isinstance(control, packets.EnrolRefused):
        reason = public_text(control.reason)
        raise _Unknown(reason) if control.may_pass else RefusedError(reason)
    if isinstance(control, packets.Closed):
        raise RefusedError(public_text(control.reason))
    return public_text(control.name) if isinstance(control, packets.Enrolled) else None


class _NobodyListens(PeerGone):
    """The machine is there, and may yet start its program."""


def _wait_for(address: str, timeout_s: float, wait_s: float, tell: Callable[[str], object]) -> None:
    until, is_told = Deadline.after(wait_s), False
    while True:
        try:
            _dial(address, timeout_s)
        except _NobodyListens:
            if until.has_passed():
                raise
            if not is_told:
                tell(f"nobody listens at {address} yet; trying for {wait_s:.0f} s")
                is_told = True
            time.sleep(min(LISTEN_S, until.left_s()))
        else:
            return


def _dial(address: str, timeout_s: float) -> None:
    """Find out quickly, and in plainer words than ZeroMQ has, that nobody is there.

    Raises:
        PeerGone: nobody takes a connection.
    """
    where = parse_address(address)
    assert where is not None
    try:
        socket.create_connection(where, timeout_s).close()
    except ConnectionRefusedError:
        raise _NobodyListens(
            f"nobody listens at {address}: the machine is there, but no coordinator serves; start "
            "it (coordinator serve) before the code expires"
        ) from None
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PeerGone(
            f"cannot reach {address}, the address in the code ({why}): another network, a "
            "firewall, or not the coordinator's address (coordinator enrol NAME --address ...)"
        ) from None


def _no_answer(line: Line, address: str) -> EdgeError:
    """Return why nothing came from somebody who takes connections."""
    if line.is_up:
        return PeerGone(f"{address} took the connection and does not answer; try again")
    return PeerGone(
        f"what listens at {address} does not prove that it has the key in the code: another "
        "coordinator, one with a new key, or none; make a new code on the coordinator"
    )
