"""What a device receives, sorted: answers, new orders, and what ends a session or a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from edge_sdk import errors
from edge_sdk.client.states import MessageAction, State, action_on
from edge_sdk.deadline import Deadline
from edge_sdk.errors import (
    DeviceError,
    EdgeError,
    PeerGone,
    ReceiveTimeout,
    RefusedError,
    SessionLost,
    public_text,
)
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Failure, Pause, Refused, RunOver, Stamp
from edge_sdk.transport.link import Link

log = logging.getLogger(__name__)

# How long one look for a message lasts, so that a stop is noticed.
POLL_S = 0.25


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """The application asked the client to stop."""


class RunEnded(Exception):  # noqa: N818 - control flow, not an error
    """The coordinator has closed the run."""


class Redirected(Exception):  # noqa: N818 - control flow, not an error
    """The coordinator wants something other than what was going on."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope


class Inbox:
    """The receiving half of a link; what is done with a message is said in `states.py`."""

    def __init__(
        self,
        link: Link,
        stop: threading.Event,
        state: State = State.GREETING,
        told: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._link, self._state, self._told = link, state, told
        self.look: Callable[[], None] = partial(_leave_if, stop)
        """Called before each look for a message; it raises Stopped where the device is to go."""
        self.mark: Callable[[Pause], None] = lambda _pause: None
        """Takes a Pause after which what is going on goes on."""

    def enter(self, state: State) -> None:
        """Note that the device does something else from now on."""
        self._state = state

    def wait_for(self, *kinds: type, patience_s: float = 0.0) -> Envelope:
        """Return the next message of *kinds*; without any, the next that the state waits for.

        Args:
            kinds: Messages that the state waits for.
            patience_s: Seconds for which nobody need answer: the coordinator may be down.

        Raises:
            Redirected: a new order came, and ends what is going on.
            Stopped: the application wants to leave.
            RunEnded: the coordinator has closed the run.
            RefusedError: it does not want this device.
            PeerGone: nobody has answered for so long, or the session is lost.
            EdgeError: it failed to do what it was asked, or sent what it must not send now.
        """
        deadline, told = Deadline.after(patience_s), ""
        while True:
            try:
                envelope = self._take(Deadline.after(POLL_S))
            except ReceiveTimeout:
                continue
            except SessionLost:
                raise
            except PeerGone as gone:
                left_s = deadline.left_s()
                if not left_s:
                    raise
                log.info("coordinator.absent reason=%s; trying for %.0f s", gone, left_s)
                if str(gone) != told:
                    self._told(f"{gone}; trying for {left_s:.0f} s")
                told = str(gone)
                continue
            if envelope is not None and (not kinds or isinstance(envelope.message, kinds)):
                return envelope

    def wait_for_reply(self, kind: type, stamp: Stamp, micro: int | None = None) -> Envelope:
        """Return the answer to what was just sent, by its stamp; older ones are stale.

        Raises as `wait_for` does.
        """
        return self.wait_for_first({kind: micro}, stamp)

    def wait_for_first(self, due: Mapping[type, int | None], stamp: Stamp) -> Envelope:
        """Return the first answer that comes of those that are *due*; older ones are stale.

        Args:
            due: The micro-batch that an answer of each kind is for; None: any.
            stamp: What the answers belong to.

        Raises as `wait_for` does.
        """
        while True:
            envelope = self.wait_for(*due)
            message = envelope.message
            micro = due[type(message)]
            if message.stamp == stamp and (micro is None or message.micro == micro):
                return envelope
            log.debug("message.stale kind=%s step=%d", type(message).__name__, message.stamp.step)

    def poll(self) -> None:
        """Look for a new order or an end between two steps; raise if there is one."""
        with suppress(ReceiveTimeout):
            self._take(Deadline.after(0.0))

    def _take(self, deadline: Deadline) -> Envelope | None:
        """Return the next message if the state waits for such; None for one to be skipped."""
        self.look()
        envelope = self._link.receive(deadline)
        action = action_on(self._state, envelope.message)
        if action is MessageAction.END:
            raise _end(envelope.message)
        if isinstance(envelope.message, Pause) and envelope.message.goes_on:
            self.mark(envelope.message)
            return None
        if action is MessageAction.OBEY:
            raise Redirected(envelope)
        if action is MessageAction.SKIP:
            log.debug("message.skipped kind=%s", type(envelope.message).__name__)
            return None
        return envelope


def _leave_if(stop: threading.Event) -> None:
    """Leave at once, wherever the device is."""
    if stop.is_set():
        raise Stopped


def _end(message: Refused | RunOver | Failure) -> Exception:
    """Return the coordinator's last word as an exception of ours."""
    if isinstance(message, Refused):
        return RefusedError(public_text(message.reason))
    if isinstance(message, RunOver):
        return RunEnded(public_text(message.reason))
    return _their_error(message)


def _their_error(failure: Failure) -> EdgeError:
    """Return the coordinator's error as an exception of ours.

    Its class counts where it says what is wrong with this device. Trouble of the coordinator's own,
    such as a full disk of which an older one tells its devices, is none of ours: another day it may
    be over, and exit code 1 lets a service try again.
    """
    kind = getattr(errors, failure.error, EdgeError)
    is_ours = isinstance(kind, type) and issubclass(kind, EdgeError)
    if not is_ours or not (kind.blames_peer or issubclass(kind, DeviceError)):
        kind = EdgeError
    return kind(f"coordinator: {public_text(failure.text)}")
