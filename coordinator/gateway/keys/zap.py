"""The answer to libzmq's question whether a key may come in (ZAP).

Not here: which keys are registered (`allow_list.py`), what a code is (`enrolment_book.py`).
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

import zmq
from zmq.utils import z85

from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.refused_keys import RefusedKeys
from coordinator.gateway.ration import Bucket, Trouble, source_of
from edge_sdk.transport.keys import fingerprint

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = "edgesplit"
# Handshakes of one key, at once and a second: a device that finds nobody behind a connection makes
# two in a second.
MOST_HANDSHAKES, HANDSHAKES_PER_S = 120.0, 2.0
# Keys of one address that are looked up in the book of codes, at once and a second: a dozen devices
# that are not registered try less often. Of so many addresses this is remembered.
MOST_GUESSES, GUESSES_PER_S = 200.0, 20.0
MOST_GUESSERS = 1024


class ZapHandler:
    """Tells libzmq whether a key may come in; lives in the thread that polls `socket`.

    Not pyzmq's ThreadAuthenticator: one exception ends its thread for good, and nobody notices.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        allowed: AllowList,
        trouble: Trouble,
        book: EnrolmentBook | None = None,
        refused: RefusedKeys | None = None,
    ) -> None:
        self._allowed, self._trouble = allowed, trouble
        self._book, self.refused = book, refused
        self._is_news = False
        self._handshakes: dict[str, Bucket] = {}
        self._guesses: OrderedDict[str, Bucket] = OrderedDict()
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(ZAP_ADDRESS)

    def answer_all(self) -> None:
        """Answer every question that waits."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
                reply = self._reply(parts)
                if reply:
                    self.socket.send_multipart(reply, zmq.NOBLOCK)
            except zmq.Again:
                return

    def _reply(self, parts: list[bytes]) -> list[bytes]:
        try:
            empty = parts.index(b"")
            route, (version, request, domain, address, _, mechanism, *rest) = (
                parts[: empty + 1],
                parts[empty + 1 :],
            )
        except ValueError:  # not a question of libzmq's: a socket in this process misbehaves
            log.error("zap.question_bad parts=%d", len(parts))
            return []
        key, now_s = self._key(domain, mechanism, rest), time.monotonic()
        source = source_of(address.decode("ascii", "replace").removeprefix("::ffff:"))
        name = self._name_of(key) if key else None
        bucket = name or (self._code_of(key, source, now_s) if key else None)
        status, text = (b"200", b"OK") if bucket else (b"400", b"key is not registered")
        if self._allowed.is_closed or (bucket and not self._may_dial(bucket, now_s)):
            status, text, bucket = b"300", b"not now", None  # it may try again, and is told nothing
        elif bucket is None:
            mine = fingerprint(key) if key else "?"
            self._trouble.tell("device.refused", source, f"key={key} fingerprint={mine}", now_s)
            if key and self.refused is not None:
                self.refused.note(key, source, time.time())
        return [*route, version, request, status, text, key.encode() if bucket else b"", b""]

    def _name_of(self, key: str) -> str | None:
        """Return the name of a registered key, also of one that was registered a moment ago.

        A device has two connections: to refuse one of them and take the other would end it.
        """
        name = self._allowed.name_of(key)
        if name is None and self._allowed.is_touched():
            self._is_news |= self._allowed.reload_if_changed(is_second_look=False)
            name = self._allowed.name_of(key)
        return name

    def _code_of(self, key: str, source: str, now_s: float) -> str | None:
        """Return what the handshakes of a code's one-time key count for; None if it is no such key.

        Whoever has tried too many keys is refused whatever the next one is.
        """
        if self._book is None:
            return None
        bucket = self._guesses.setdefault(source, Bucket(MOST_GUESSES, GUESSES_PER_S))
        self._guesses.move_to_end(source)
        if len(self._guesses) > MOST_GUESSERS:
            self._guesses.popitem(last=False)
        if not bucket.take(1.0, now_s):
            return None
        entry = self._book.find(key)
        return None if entry is None else f"code of {entry.name}"  # no device has such a name

    def _may_dial(self, name: str, now_s: float) -> bool:
        bucket = self._handshakes.setdefault(name, Bucket(MOST_HANDSHAKES, HANDSHAKES_PER_S))
        return bucket.take(1.0, now_s)

    @staticmethod
    def _key(domain: bytes, mechanism: bytes, credentials: list[bytes]) -> str:
        if domain != ZAP_DOMAIN.encode() or mechanism != b"CURVE" or len(credentials) != 1:
            return ""
        if len(credentials[0]) != 32:
            return ""
        return str(z85.encode(credentials[0]).decode())

    def has_news(self, now_s: float) -> bool:
        """Write refused keys down if it is time; return whether the allow-list has changed."""
        if self.refused is not None:
            self.refused.save(now_s, lambda key: self._allowed.name_of(key) is not None)
        is_news, self._is_news = self._is_news, False
        return self._allowed.reload_if_changed() or is_news

    def close(self) -> None:
        """Close the socket; libzmq lets nobody in from then on."""
        self.socket.close()
