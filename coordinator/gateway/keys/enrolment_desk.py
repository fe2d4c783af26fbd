"""The desk at the coordinator's port: whoever has the one-time key of a code may enrol, no more.

A connection whose key is in the book but not on the allow-list gets no further than here: what it
sends is an `Enrol` or is not read. To the doorkeeper it stays a stranger, with a stranger's few
bytes and seconds. Used by the I/O thread alone. Not here: codes and their file
(`enrolment_book.py`).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Any

from zmq.utils import z85

from coordinator.gateway.doorkeeper import DEAR, Caller, Doorkeeper
from coordinator.gateway.interface import Registered
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from edge_sdk.errors import EdgeError, RemoteProtocolError, StorageError, public_text
from edge_sdk.protocol import packets
from edge_sdk.transport.keys import is_public_key

log = logging.getLogger(__name__)

# A device asks once, and again where an answer was lost.
MOST_QUESTIONS = 8


class EnrolDesk:
    """Answers connections that have proven the one-time key of a code."""

    def __init__(
        self,
        book: EnrolmentBook,
        allowed: AllowList,
        door: Doorkeeper,
        say: Callable[[bytes, Any], object],
        tell: Callable[[Registered], object],
    ) -> None:
        self._book, self._allowed, self._door = book, allowed, door
        self._say, self._tell = say, tell

    def takes(self, caller: Caller, now_s: float) -> bool:
        """Answer *caller*, which is no registered device; return False if it has no code either."""
        if not caller.key or self._book.find(caller.key) is None:
            return False
        connection = caller.connection
        if not self._door.affords(connection, DEAR, now_s):
            return True
        if connection is not None:
            connection.num_loose += 1
            if connection.num_loose > MOST_QUESTIONS:
                self._door.shut(connection, "too many questions with a code", now_s)
                return True
        try:
            self._say(caller.route, self._answer(caller, now_s))
        except RemoteProtocolError as error:
            self._door.trouble.tell("enrol.frame_bad", caller.address, str(error), now_s)
            self._door.shut(connection, "a code enrols and does nothing else", now_s)
        return True

    def _answer(self, caller: Caller, now_s: float) -> packets.Enrolled | packets.EnrolRefused:
        """Return what to say to *caller*.

        Raises:
            RemoteProtocolError: it has sent something else than `Enrol`.
        """
        control = packets.control_in(caller.frame.buffer)
        if not isinstance(control, packets.Enrol) or not _is_curve_key(control.key):
            raise RemoteProtocolError("no question to enrol a key")
        was = self._allowed.name_of(control.key)
        try:
            name = self._book.redeem(caller.key, control.key, self._allowed)
        except EdgeError as error:
            self._door.trouble.tell("enrol.refused", caller.address, str(error), now_s)
            is_ours = isinstance(error, StorageError)  # a lock that another process has, a disk
            return packets.EnrolRefused(reason=public_text(error), may_pass=is_ours)
        if was != name:
            log.info("device.enrolled name=%s address=%s", name, caller.address)
            self._tell(Registered(name, control.key, caller.address))
        return packets.Enrolled(name=name)


def _is_curve_key(text: str) -> bool:
    """Return whether *text* is 32 bytes in Z85; not every row of its letters is."""
    try:
        return is_public_key(text) and len(z85.decode(text.encode())) == 32
    except (ValueError, struct.error):
        return False
