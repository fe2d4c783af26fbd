"""Who may connect: the allow-list of public keys, and the answer to libzmq's question (ZAP).

The list is a JSON file ``{"devices": {name: public key}}`` whatever its name ends in, replaced as a
whole and read again when it changes, so `coordinator client register` works while a run is on. Not
here: sessions (`sessions.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
from zmq.utils import z85

from coordinator.gateway.ration import Bucket, Trouble, source_of
from edge_sdk.errors import ConfigError, public_text
from edge_sdk.files import atomic_write, storage_errors
from edge_sdk.transport.keys import is_public_key, load_public_key

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = "edgesplit"
# Names become folder names, log fields and terminal output.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# 100,000 devices of about 60 bytes.
_MAX_FILE_BYTES = 8 * 1024 * 1024
# Handshakes of one key, at once and a second: a device that finds nobody behind a connection makes
# two in a second.
MOST_HANDSHAKES, HANDSHAKES_PER_S = 120.0, 2.0
# Trouble of a disk or of this process that says nothing about who may come.
_OF_THE_MOMENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EINTR)
# Content of a file that is not there, and of none at all; no list looks like them.
_MISSING, _NONE = b"\0missing", b"\0none"


def is_device_name(name: str) -> bool:
    """Return whether *name* may be a device's name."""
    return _NAME.fullmatch(name) is not None


class AllowList:
    """Names of the devices that may connect, and their public keys.

    Readers never wait: a change replaces both maps. However the file was changed and by whom, its
    content decides, not its times. A list that reads well counts at once. What does not may be a
    moment of somebody's editor, so it counts when it is seen a second time: a missing file lets
    nobody in; a damaged one keeps those whose keys still stand in it; while the file may not be
    read nobody is in, and everybody may come back as soon as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_closed = False
        """Whether the file may not be read, so that nobody knows who may come."""
        self._keys: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._why = ""
        self._content = self._read()
        self._doubtful: bytes | None = _NONE
        if self._content is None:
            raise ConfigError(f"cannot read {self.path}: {self._why}")
        self._take(self._parsed(self._content))

    def devices(self) -> dict[str, str]:
        """Return the public key of every registered name, sorted."""
        return dict(sorted(self._keys.items()))

    def name_of(self, key: str) -> str | None:
        """Return the name under which *key* is registered, or None."""
        return self._names.get(key)

    def register(self, name: str, key: str | Path) -> None:
        """Let the owner of *key* (Z85, or a file) in as *name*; replaces the name's old key."""
        if not is_device_name(name):
            raise ConfigError(f"device name {name!r}: letters, digits, '.', '_', '-', at most 64")
        public = load_public_key(key)
        with self._changing() as keys:
            owner = next((other for other, known in keys.items() if known == public), name)
            if owner != name:
                raise ConfigError(f"this key is registered as {owner!r} already")
            keys[name] = public
        log.info("device.registered name=%s", name)

    def unregister(self, name: str) -> None:
        """Stop letting *name* in; its live connections end with their next message."""
        with self._changing() as keys:
            if keys.pop(name, None) is None:
                raise ConfigError(f"no device is registered as {name!r}")
        log.info("device.unregistered name=%s", name)

    def reload_if_changed(self) -> bool:
        """Read the file again; return whether the list is another one now."""
        try:
            content = self._read()
        except OSError as error:  # of the disk or of this process: nobody has changed the list
            log.error("allow_list.unread error=%s", error.strerror)
            return False
        if content == self._content:
            self._doubtful = _NONE
            return False
        keys, why = {}, self._why
        if content is not None:
            try:
                keys, why = self._parsed(content), ""
            except ConfigError as error:
                text = content.decode("ascii", "replace")
                keys = {name: key for name, key in self._keys.items() if key in text}
                why = str(error)
        is_missing = content == _MISSING
        if (why or is_missing) and content != self._doubtful:
            self._doubtful = content  # for a second look
            return False
        self._content, self.is_closed = content, content is None
        self._take(keys)
        if why:
            log.error("allow_list.bad devices=%d error=%s", len(keys), public_text(why))
        else:
            log.info("allow_list.reloaded devices=%d", len(keys))
        return True

    def _read(self) -> bytes | None:
        """Return what stands in the file; None if it may not be read.

        Raises:
            OSError: It can not be read now, for a reason that has nothing to do with it.
        """
        try:
            with self.path.open("rb") as file:
                return file.read(_MAX_FILE_BYTES)
        except FileNotFoundError:
            return _MISSING
        except OSError as error:
            if error.errno in _OF_THE_MOMENT:
                raise
            self._why = str(error.strerror)
            return None

    def _take(self, keys: dict[str, str]) -> None:
        self._keys = keys
        self._names = {key: name for name, key in keys.items()}

    def _parsed(self, content: bytes) -> dict[str, str]:
        if content == _MISSING:
            return {}
        try:
            keys = json.loads(content)["devices"]
            for name, key in keys.items():
                if not is_device_name(name):
                    raise ValueError(f"bad name {name!r}")
                if not is_public_key(key):
                    raise ValueError(f"what {name} has is no public key")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path} is not a list of devices: {error}") from error
        if len(set(keys.values())) != len(keys):
            raise ConfigError(f"{self.path}: two names have the same key")
        return dict(keys)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        """Read the list, let the caller change it, write it; one process at a time."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another user's lock, too: reading is enough for it.
            lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                content = self._read()
                if content is None:
                    raise ConfigError(f"cannot read {self.path}: {self._why}")
                keys = self._parsed(content)
                yield keys
                text = json.dumps({"devices": dict(sorted(keys.items()))}, indent=1) + "\n"
                owned = self.path if content != _MISSING else self.path.parent
                owner = owned.stat()
                atomic_write(self.path, text, mode=0o600)
                _give_to(self.path, owner)
            finally:
                os.close(lock)
        self._take(keys)
        self._content = text.encode()


def _give_to(path: Path, owner: os.stat_result) -> None:
    """Let whoever had a list go on reading it when another user, such as root, has written it."""
    if path.stat().st_uid == owner.st_uid:
        return
    try:
        os.chown(path, owner.st_uid, owner.st_gid)
    except PermissionError:
        path.chmod(0o644)  # its keys are public ones


class ZapHandler:
    """Tells libzmq whether a key may come in; lives in the thread that polls `socket`.

    Not pyzmq's ThreadAuthenticator: one exception ends its thread for good, and nobody notices.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList, trouble: Trouble
    ) -> None:
        self._allowed, self._trouble = allowed, trouble
        self._handshakes: dict[str, Bucket] = {}
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
        key = self._key(domain, mechanism, rest)
        name = self._allowed.name_of(key) if key else None
        status, text = (b"200", b"OK") if name else (b"400", b"key is not registered")
        if self._allowed.is_closed or (name and not self._may_dial(name)):
            status, text, name = b"300", b"not now", None  # it may try again, and is told nothing
        elif name is None:
            source = source_of(address.decode("ascii", "replace").removeprefix("::ffff:"))
            self._trouble.tell("device.refused", source, f"key={key}", time.monotonic())
        return [*route, version, request, status, text, key.encode() if name else b"", b""]

    def _may_dial(self, name: str) -> bool:
        bucket = self._handshakes.setdefault(name, Bucket(MOST_HANDSHAKES, HANDSHAKES_PER_S))
        return bucket.take(1.0, time.monotonic())

    @staticmethod
    def _key(domain: bytes, mechanism: bytes, credentials: list[bytes]) -> str:
        if domain != ZAP_DOMAIN.encode() or mechanism != b"CURVE" or len(credentials) != 1:
            return ""
        if len(credentials[0]) != 32:
            return ""
        return str(z85.encode(credentials[0]).decode())

    def close(self) -> None:
        """Close the socket; libzmq lets nobody in from then on."""
        self.socket.close()
