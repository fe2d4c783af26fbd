"""Who may connect: the allow-list of public keys, and the answer to libzmq's question (ZAP).

The list is a JSON file ``{"devices": {name: public key}}`` whatever its name ends in, replaced as a
whole and read again when it changes, so `coordinator client register` works while a run is on. Not
here: sessions (`sessions.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
from zmq.utils import z85

from coordinator.gateway.ration import Trouble, source_of
from edge_sdk.errors import ConfigError
from edge_sdk.files import atomic_write, storage_errors
from edge_sdk.transport.keys import load_public_key

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = "edgesplit"
# Names become folder names, log fields and terminal output.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# 100,000 devices of about 60 bytes.
_MAX_FILE_BYTES = 8 * 1024 * 1024


def is_device_name(name: str) -> bool:
    """Return whether *name* may be a device's name."""
    return _NAME.fullmatch(name) is not None


class AllowList:
    """Names of the devices that may connect, and their public keys.

    Readers never wait: a change replaces both maps. A missing file lets nobody in. While the file
    cannot be read, the last good list stays in force and an error is logged, so that a slip of the
    editor does not throw out a whole fleet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._seen: tuple[int, int, int] | None = None
        self._take(self._load())
        self._seen = self._stamp()

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
        """Read the file again if it has changed; return whether the list is new."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._take(self._load())
        except ConfigError as error:
            log.error("allow_list.reload_failed error=%s", error)
            return False
        log.info("allow_list.reloaded devices=%d", len(self._keys))
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _take(self, keys: dict[str, str]) -> None:
        self._keys = keys
        self._names = {key: name for name, key in keys.items()}

    def _load(self) -> dict[str, str]:
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        try:
            keys = json.loads(data)["devices"]
            for name, key in keys.items():
                if not is_device_name(name):
                    raise ValueError(f"bad name {name!r}")
                load_public_key(key)
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(f"{self.path} is not a list of devices: {error}") from error
        if len(set(keys.values())) != len(keys):
            raise ConfigError(f"{self.path}: two names have the same key")
        return dict(keys)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        """Read the list, let the caller change it, write it; one process at a time."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                keys = self._load()
                yield keys
                text = json.dumps({"devices": dict(sorted(keys.items()))}, indent=1) + "\n"
                atomic_write(self.path, text, mode=0o600)
        self._take(keys)
        self._seen = self._stamp()


class ZapHandler:
    """Tells libzmq whether a key may come in; lives in the thread that polls `socket`.

    Not pyzmq's ThreadAuthenticator: one exception ends its thread for good, and nobody notices.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList, trouble: Trouble
    ) -> None:
        self._allowed, self._trouble = allowed, trouble
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
        if name is None:
            source = source_of(address.decode("ascii", "replace").removeprefix("::ffff:"))
            self._trouble.tell("device.refused", source, f"key={key}", time.monotonic())
        return [*route, version, request, status, text, key.encode() if name else b"", b""]

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
