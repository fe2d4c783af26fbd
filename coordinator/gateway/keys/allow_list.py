"""Who may connect: the allow-list of public keys.

The list is a JSON file ``{"devices": {name: public key}}`` whatever its name ends in, replaced as a
whole and read again when it changes, so `coordinator client register` works while a run is on. Not
here: the answer to libzmq's question (`zap.py`), codes (`enrolment_book.py`), who changes the list
at a time (`list_lock.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from coordinator.gateway.keys.list_lock import locked
from edge_sdk.errors import ConfigError, public_text
from edge_sdk.files import atomic_write, identity, storage_errors
from edge_sdk.transport.keys import is_public_key, load_public_key

log = logging.getLogger(__name__)

# Names become folder names, log fields and terminal output.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# 100,000 devices of about 60 bytes.
_MAX_FILE_BYTES = 8 * 1024 * 1024
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
        self._has_taken = False
        """Whether a key went by our own doing, and `reload_if_changed` has not said so."""
        self._identity = identity_of(self.path)
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

    def register(
        self,
        name: str,
        key: str | Path,
        *,
        replaces: bool = True,
        is_patient: bool = True,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Let the owner of *key* in as *name*.

        Args:
            name: Name in the coordinator's runs.
            key: Its public key as Z85, or the file that holds it.
            replaces: Whether the name may be registered already, with another key.
            is_patient: Whether to wait for another process that changes the list.
            first: Called when nothing is in the way any more, before the list is written; what it
                raises leaves the list as it was.

        Raises:
            ConfigError: the name is none, or taken, or the key is registered under another one.
            StorageError: the list cannot be written, or not now.
        """
        if not is_device_name(name):
            raise ConfigError(f"device name {name!r}: letters, digits, '.', '_', '-', at most 64")
        public = load_public_key(key)
        with self._changing(is_patient=is_patient) as keys:
            owner = next((other for other, known in keys.items() if known == public), name)
            if owner != name:
                raise ConfigError(f"this key is registered as {owner!r} already")
            if not replaces and keys.get(name, public) != public:
                raise ConfigError(
                    f"{name} is registered already, with another key; --replace takes the new one"
                )
            first()
            keys[name] = public
        log.info("device.registered name=%s", name)

    def unregister(self, name: str) -> None:
        """Stop letting *name* in; its live connections end with their next message."""
        with self._changing() as keys:
            if keys.pop(name, None) is None:
                raise ConfigError(f"no device is registered as {name!r}")
        log.info("device.unregistered name=%s", name)

    def is_touched(self) -> bool:
        """Return whether the file looks other than the last time that this was asked: quickly."""
        before, self._identity = self._identity, identity_of(self.path)
        return before != self._identity

    def reload_if_changed(self, *, is_second_look: bool = True) -> bool:
        """Read the file again; return whether somebody else has changed it, or we took a key.

        Args:
            is_second_look: Whether enough time has passed since the last look for a file that does
                not read well to count; without it only one that reads well does.
        """
        try:
            content = self._read()
        except OSError as error:  # of the disk or of this process: nobody has changed the list
            log.error("allow_list.unread error=%s", error.strerror)
            return False
        if content == self._content:
            self._doubtful, has_taken, self._has_taken = _NONE, self._has_taken, False
            return has_taken
        keys, why = {}, self._why
        if content is not None:
            try:
                keys, why = self._parsed(content), ""
            except ConfigError as error:
                text = content.decode("ascii", "replace")
                keys = {name: key for name, key in self._keys.items() if key in text}
                why = str(error)
        is_missing = content == _MISSING
        if (why or is_missing) and not (is_second_look and content == self._doubtful):
            if is_second_look:
                self._doubtful = content
            return False
        self._content, self.is_closed, self._has_taken = content, content is None, False
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
    def _changing(self, *, is_patient: bool = True) -> Iterator[dict[str, str]]:
        """Read the list, let the caller change it, write it; one process at a time."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path, is_patient=is_patient):
                content = self._read()
                if content is None:
                    raise ConfigError(f"cannot read {self.path}: {self._why}")
                keys = self._parsed(content)
                yield keys
                text = json.dumps({"devices": dict(sorted(keys.items()))}, indent=1) + "\n"
                owned = self.path if content != _MISSING else self.path.parent
                owner = owned.stat()
                atomic_write(self.path, text, mode=0o600)
                if not give_to(self.path, owner):
                    self.path.chmod(0o644)  # its keys are public ones
        self._has_taken |= not set(self._keys.values()) <= set(keys.values())
        self._take(keys)
        self._content = text.encode()


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written; None where it cannot be looked at."""
    try:
        return identity(path)
    except OSError:
        return None


def give_to(path: Path, owner: os.stat_result) -> bool:
    """Let whoever had a file go on reading it when another user, such as root, has written it.

    Returns whether they may; only root can give a file away.
    """
    if path.stat(follow_symlinks=False).st_uid != owner.st_uid:
        try:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        except PermissionError:
            return False
    return True
