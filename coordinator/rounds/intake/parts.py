"""Stretches of the model's parts for devices that fetch them: read when due, not by the loop.

A device has at most two on their way: what it was sent and has not confirmed counts. What it asks
for beyond that waits, unread; one that asks for still more breaks the protocol.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np

from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Gateway
from coordinator.rounds.admission import Admission
from edge_sdk.errors import PeerGone, RemoteProtocolError
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import PartData, PartRequest
from edge_sdk.protocol.plan import Part

# Bytes of one answer to a PartRequest: enough to hide the round trip, little for a device's memory.
PART_DATA_BYTES = 4 * 1024 * 1024
# Requests of a device that have no answer yet. An honest one has a single one.
MOST_ASKED = 2

_Read = tuple[str, int, PartRequest, Part, "Future[bytes]"]


class Parts:
    """What devices have asked for, and what is being read."""

    def __init__(
        self, model: ServerModel, gateway: Gateway, admission: Admission, pool: Executor | None
    ) -> None:
        """Serve the parts of *model*.

        Args:
            model: What is read.
            gateway: Knows what devices have not confirmed.
            admission: Sends, and lets those go whose requests make no sense.
            pool: Where files are read; None: in a thread of its own.
        """
        self._model, self._gateway, self._admission = model, gateway, admission
        self._pool = pool or ThreadPoolExecutor(1, "parts")
        self._waiting: dict[str, deque[tuple[int, PartRequest, Part]]] = {}
        """By device, in the order in which they have their turn; with the number of the session."""
        self._read: queue.SimpleQueue[_Read] = queue.SimpleQueue()
        self._reading = ""
        """Whose request is being read."""

    def ask(self, device: str, envelope: Envelope) -> None:
        """Take a request in.

        Raises:
            RemoteProtocolError: there is no such part, or too much was asked for.
        """
        request: PartRequest = envelope.message
        part = self._model.find_part(request.sha256, request.offset)
        own = self._waiting.setdefault(device, deque())
        if len(own) + (self._reading == device) >= MOST_ASKED:
            raise RemoteProtocolError(f"more than {MOST_ASKED} parts asked for at once")
        own.append((self._admission.sessions[device], request, part))
        self.pump()

    def pump(self) -> None:
        """Send what was read, and let whoever has the next turn be served."""
        while not self._read.empty():  # nobody else takes from it
            self._send(*self._read.get_nowait())
        if self._waiting and not self._reading:
            self._begin()

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        for device in list(self._waiting):
            own = self._waiting[device]
            while own and own[0][0] != self._admission.sessions[device]:
                own.popleft()  # its session is over
            if not own:
                del self._waiting[device]
            elif self._has_room(device):
                del self._waiting[device]
                session, request, part = own.popleft()
                if own:
                    self._waiting[device] = own  # behind all others
                self._start(device, session, request, part)
                return

    def _has_room(self, device: str) -> bool:
        try:
            return self._gateway.stats(device).queued_bytes <= PART_DATA_BYTES
        except PeerGone:
            return False

    def _start(self, device: str, session: int, request: PartRequest, part: Part) -> None:
        self._reading = device
        read: Callable[[], bytes] = lambda: self._model.read_part(  # noqa: E731
            part, request.offset, PART_DATA_BYTES
        )

        def finished(done: Future[bytes]) -> None:
            self._read.put((device, session, request, part, done))
            self._gateway.wake()

        self._pool.submit(read).add_done_callback(finished)

    def _send(
        self, device: str, session: int, request: PartRequest, part: Part, done: Future[bytes]
    ) -> None:
        self._reading = ""
        with self._admission.part_of(device):
            data = np.frombuffer(done.result(), np.uint8)
            if session != self._admission.sessions[device]:
                return
            answer = PartData(
                stamp=request.stamp,
                sha256=part.sha256,
                offset=request.offset,
                total_bytes=part.num_bytes,
            )
            self._admission.send(device, answer, {"data": (data, "uint8")})
