"""What a device receives, sorted: answers, new orders, and what ends a session or a run."""

from __future__ import annotations

import logging
import threading
from typing import Any

from edge_sdk import errors
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, PeerGone, ReceiveTimeout, RefusedError, SessionLost
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import (
    Failure,
    Pause,
    PlanAssigned,
    Refused,
    RoundStart,
    RunOver,
    Stamp,
)
from edge_sdk.transport.link import Link

log = logging.getLogger(__name__)

# How long one look for a message lasts, so that a stop is noticed.
POLL_S = 0.25


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """The application asked the client to stop."""


class RunEnded(Exception):  # noqa: N818 - control flow, not an error
    """The coordinator has closed the run."""


class Redirected(Exception):  # noqa: N818 - control flow, not an error
    """The coordinator wants something else than what was going on."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope


class Inbox:
    """The receiving half of a link."""

    def __init__(self, link: Link, stop: threading.Event) -> None:
        self._link, self._stop = link, stop

    def next(self) -> Envelope:
        """Return the next message.

        Raises:
            Stopped: the application wants to leave.
            RunEnded: the coordinator has closed the run.
            RefusedError: it does not want this device.
            EdgeError: it failed to do what it was asked, or the session is lost.
        """
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                return self._look(Deadline.after(POLL_S))
            except ReceiveTimeout:
                continue

    def _look(self, deadline: Deadline) -> Envelope:
        envelope = self._link.receive(deadline)
        message = envelope.message
        if isinstance(message, Refused):
            raise RefusedError(message.reason)
        if isinstance(message, RunOver):
            raise RunEnded(message.reason)
        if isinstance(message, Failure):
            raise _their_error(message)
        return envelope

    def expect(self, kind: type[Any]) -> Envelope:
        """Return the next message of *kind*."""
        while True:
            envelope = self.next()
            if isinstance(envelope.message, kind):
                return envelope
            log.debug("message.ignored kind=%s", type(envelope.message).__name__)

    def first(self, kind: type[Any], patience_s: float) -> Envelope:
        """Return the first message of *kind* of a session, from a coordinator that may be down.

        Raises:
            PeerGone: nobody has answered for *patience_s* seconds.
        """
        deadline = Deadline.after(patience_s)
        while True:
            try:
                return self.expect(kind)
            except SessionLost:
                raise
            except PeerGone as gone:
                left_s = deadline.left_s()
                if not left_s:
                    raise
                log.warning("coordinator.absent reason=%s retrying_s=%.0f", gone, left_s)

    def answer(self, kind: type[Any], stamp: Stamp, micro: int) -> Envelope:
        """Return the answer to what was just sent; older ones are stale.

        Raises:
            Redirected: a new order came instead.
        """
        while True:
            envelope = _unless_order(self.next())
            message = envelope.message
            if isinstance(message, kind) and (message.stamp, message.micro) == (stamp, micro):
                return envelope
            log.debug("message.stale kind=%s step=%d", type(message).__name__, message.stamp.step)

    def reply(self, kind: type[Any], stamp: Stamp, *, heeds_orders: bool) -> Envelope:
        """Return the next message of *kind* with *stamp*; older ones are stale.

        Raises:
            Redirected: a new order came instead, and is heeded.
        """
        while True:
            envelope = self.next()
            if heeds_orders:
                _unless_order(envelope)
            if isinstance(envelope.message, kind) and envelope.message.stamp == stamp:
                return envelope
            log.debug("message.stale kind=%s", type(envelope.message).__name__)

    def poll(self) -> None:
        """Between two steps: raise if there is a new order."""
        if self._stop.is_set():
            raise Stopped
        try:
            _unless_order(self._look(Deadline.after(0.0)))
        except ReceiveTimeout:
            return


def _unless_order(envelope: Envelope) -> Envelope:
    if isinstance(envelope.message, RoundStart | Pause | PlanAssigned):
        raise Redirected(envelope)
    return envelope


def _their_error(failure: Failure) -> EdgeError:
    """The coordinator's error as an exception of ours."""
    kind = getattr(errors, failure.error, EdgeError)
    if not (isinstance(kind, type) and issubclass(kind, EdgeError)):
        kind = EdgeError
    return kind(f"coordinator: {failure.text}")
