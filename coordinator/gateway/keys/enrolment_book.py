"""The book of enrolment codes: who may enrol, until when, and what became of a code.

A file beside the allow-list, `NAME.codes`, readable by its owner only. Of a code it holds the hash
of its one-time public key: whoever reads it can enrol nobody. `coordinator enrol` writes to it and
a coordinator that serves reads it again, so that neither needs the other. Not here: what is said on
the wire (`enrolment_desk.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from coordinator.gateway.keys.allow_list import AllowList, give_to, identity_of, is_device_name
from coordinator.gateway.keys.list_lock import locked
from edge_sdk.duration import duration
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.files import atomic_write, make_folder, storage_errors
from edge_sdk.transport.enrol_code import EnrolCode, new_code, one_time_keys
from edge_sdk.transport.keys import fingerprint, is_public_key

LASTS_S = 900.0
"""How long a code may be used unless said otherwise, in seconds."""
MOST_LASTS_S = 7 * 86400.0
# Codes that wait for their devices at one time.
MOST_OPEN = 256
# So many others are remembered, so that whoever uses one again is told what became of it.
MOST_CLOSED = 256
_MOST_FILE_BYTES = 512 * 1024
# A code that is younger than now by more than this was made by another clock.
_CLOCK_S = 60.0
_HASH = re.compile("[0-9a-f]{64}")
# A clock time beyond every other, in seconds since 1970: the year 5138.
_LAST_S = 1e11
_PURPOSE = b"EdgeSplit enrolment, kept hash\0"

Fate = Literal["open", "used", "withdrawn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeEntry:
    """A code as the coordinator keeps it."""

    name: str
    """The device that may enrol with it."""
    hash: str
    """Of its one-time public key."""
    made_s: float
    """Clock times, in seconds since 1970."""
    until_s: float
    replaces: bool
    """Whether the device's name may be registered already, with another key."""
    fate: Fate = "open"
    used_by: str = ""
    """Public key of the device that has used it."""


class EnrolmentBook:
    """All codes of one allow-list. *clock* returns seconds since 1970."""

    def __init__(self, allow_list: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = allow_list.with_name(allow_list.name + ".codes")
        self._allow_list, self._clock = allow_list, clock
        self._entries: list[CodeEntry] = []
        self._content = b""
        self._identity: tuple[int, ...] | None = None

    # -- for whoever makes codes --

    def make_code(
        self,
        name: str,
        address: str,
        server_key: str,
        *,
        lasts_s: float = LASTS_S,
        replaces: bool = False,
    ) -> EnrolCode:
        """Return a code by which one device may enrol as *name*; an earlier one becomes void.

        Args:
            name: The device's name in runs.
            address: Where devices dial: tcp://HOST:PORT.
            server_key: The coordinator's public key.
            lasts_s: Seconds for which it may be used.
            replaces: Let it replace the key of a device that is registered.

        Raises:
            ConfigError: the name is none, or is registered already; the address is none.
        """
        self._check(name, lasts_s, replaces=replaces)
        try:
            code = new_code(address, server_key)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        now_s = self._clock()
        entry = CodeEntry(
            name=name,
            hash=_hash(one_time_keys(code).public),
            made_s=now_s,
            until_s=now_s + lasts_s,
            replaces=replaces,
        )
        with self._changing() as entries:
            _withdraw(entries, name)
            if sum(self._is_open(other) for other in entries) >= MOST_OPEN:
                raise ConfigError(f"{MOST_OPEN} codes wait for devices already; withdraw some")
            entries.append(entry)
        return code

    def withdraw(self, name: str) -> bool:
        """Make the code of *name* void; return whether there was one that could be used."""
        with self._changing() as entries:
            was_open = any(entry.name == name and self._is_open(entry) for entry in entries)
            _withdraw(entries, name)
        return was_open

    def open_codes(self) -> list[CodeEntry]:
        """Return the codes that may be used now, sorted by name."""
        self._load()
        return sorted(filter(self._is_open, self._entries), key=lambda entry: entry.name)

    def _check(self, name: str, lasts_s: float, *, replaces: bool) -> None:
        if not is_device_name(name):
            raise ConfigError(f"device name {name!r}: letters, digits, '.', '_', '-', at most 64")
        if not 0 < lasts_s <= MOST_LASTS_S:
            raise ConfigError(
                f"a code lasts for more than 0 min and at most {MOST_LASTS_S / 60:.0f}, "
                f"got {lasts_s / 60:g}"
            )
        owner = AllowList(self._allow_list).devices().get(name)
        if owner is not None and not replaces:
            raise ConfigError(
                f"{name} is registered already, with the key {fingerprint(owner)}; --replace lets "
                "the new device take its place"
            )

    # -- for the coordinator that serves --

    def find(self, key: str) -> CodeEntry | None:
        """Return the entry, open or not, of a one-time public *key*."""
        now = identity_of(self.path)
        if now != self._identity:
            self._identity = now  # however many strangers knock, the file is read once
            with contextlib.suppress(OSError, ConfigError):  # what was read before counts
                self._load()
        at = _place(self._entries, key)
        return None if at is None else self._entries[at]

    def redeem(self, one_time: str, key: str, allowed: AllowList) -> str:
        """Register *key* for whoever has proven the key *one_time*; return the device's name.

        The code is spent before the key counts: a power cut between the two costs a new code.

        Raises:
            RefusedError: the code, or the key, is not good for it; in words for the device.
            StorageError: the book or the allow-list cannot be written now.
        """
        with self._changing(is_patient=False) as entries:
            at = _place(entries, one_time)
            if at is None:
                raise RefusedError("the coordinator does not know this code any more")
            entry = entries[at]
            if entry.used_by == key and allowed.devices().get(entry.name) == key:
                return entry.name  # its answer was lost
            self._refuse(entry, key, allowed)

            def spend() -> None:
                entries[at] = replace(entry, fate="used", used_by=key)
                self._write(entries)

            allowed.register(
                entry.name, key, replaces=entry.replaces, is_patient=False, first=spend
            )
        return entry.name

    def _refuse(self, entry: CodeEntry, key: str, allowed: AllowList) -> None:
        """Raise RefusedError if *entry* cannot be used for *key*."""
        now_s = self._clock()
        if entry.fate == "used":
            raise RefusedError(
                f"this code was used already, by the key {fingerprint(entry.used_by)}; if that is "
                f"not this device, on the coordinator: coordinator client unregister {entry.name}"
            )
        if entry.fate == "withdrawn":
            raise RefusedError("this code was withdrawn, or a newer one was made for the device")
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
        if now_s < entry.made_s - _CLOCK_S:
            raise RefusedError(
                f"this code was made {entry.made_s - now_s:.0f} s from now by the coordinator's "
                f"clock, which says {clock}: that clock was set back; make a new code"
            )
        if now_s >= entry.until_s:
            ago = duration(round(now_s - entry.until_s))
            raise RefusedError(
                f"this code has expired {ago} ago by the coordinator's clock, which says {clock}; "
                "make a new one"
            )
        devices = allowed.devices()
        if _place(self._entries, key) is not None:
            raise RefusedError("this key is that of a code; a device makes a key of its own")
        other = next((name for name, known in devices.items() if known == key), entry.name)
        if other != entry.name:
            raise RefusedError(
                f"this device's key is registered as {other!r} already; on the coordinator: "
                f"coordinator client unregister {other}"
            )
        if devices.get(entry.name, key) != key and not entry.replaces:
            raise RefusedError(
                f"{entry.name} is registered already, with another key; on the coordinator: "
                f"coordinator enrol {entry.name} --replace"
            )

    # -- the file --

    def _is_open(self, entry: CodeEntry) -> bool:
        return entry.fate == "open" and self._clock() < entry.until_s

    def _load(self) -> None:
        """Read the file if it is another one than before.

        Raises:
            OSError: it cannot be read now.
            ConfigError: it is no book; what was read before counts.
        """
        try:
            with self.path.open("rb") as file:
                content = file.read(_MOST_FILE_BYTES)
        except FileNotFoundError:
            content = b""
        if content != self._content:
            self._entries, self._content = _parsed(content, self.path), content

    @contextlib.contextmanager
    def _changing(self, *, is_patient: bool = True) -> Iterator[list[CodeEntry]]:
        """Read the book, let the caller change it, write it; one process at a time."""
        with storage_errors(self.path):
            make_folder(self.path.parent)
            with locked(self.path, is_patient=is_patient):
                # Otherwise it could not be read by its owner.
                if os.geteuid() not in (0, self._owner().st_uid):
                    raise ConfigError(f"{self.path} is another user's; enrol devices as that user")
                self._load()
                entries = list(self._entries)
                yield entries
                self._write(entries)

    def _owner(self) -> os.stat_result:
        return (self.path if self.path.exists() else self.path.parent).stat()

    def _write(self, entries: list[CodeEntry]) -> None:
        is_open = [self._is_open(entry) for entry in entries]
        num_closed = is_open.count(False)
        kept = []
        for entry, lives in zip(entries, is_open, strict=True):
            if lives or num_closed <= MOST_CLOSED:
                kept.append(entry)
            num_closed -= not lives
        if kept == self._entries:
            return
        owner = self._owner()
        content = json.dumps({"codes": [asdict(entry) for entry in kept]}, indent=1) + "\n"
        atomic_write(self.path, content)
        give_to(self.path, owner)
        self._entries, self._content = kept, content.encode()


def _hash(key: str) -> str:
    return hashlib.sha256(_PURPOSE + key.encode()).hexdigest()


def _place(entries: list[CodeEntry], key: str) -> int | None:
    """Return where the code of a one-time key stands."""
    wanted, found = _hash(key), None
    for at, entry in enumerate(entries):  # all of them, so that the time tells nothing
        if hmac.compare_digest(entry.hash, wanted):
            found = at
    return found


def _withdraw(entries: list[CodeEntry], name: str) -> None:
    for at, entry in enumerate(entries):
        if entry.name == name and entry.fate == "open":
            entries[at] = replace(entry, fate="withdrawn")


def _parsed(content: bytes, path: Path) -> list[CodeEntry]:
    if not content:
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(content)["codes"]
        entries = [CodeEntry(**row) for row in rows]
        for entry in entries:
            if not _is_sound(entry):
                raise ValueError(f"no code of {entry.name!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no book of codes: {error}; remove it") from error
    return entries


def _is_sound(entry: CodeEntry) -> bool:
    """Return whether everything in an entry is what it ought to be, whoever has written it."""
    texts, times = (entry.name, entry.hash, entry.used_by), (entry.made_s, entry.until_s)
    return (
        all(type(text) is str for text in texts)
        and all(type(time_s) in (int, float) and 0 <= time_s < _LAST_S for time_s in times)
        and type(entry.replaces) is bool
        and is_device_name(entry.name)
        and _HASH.fullmatch(entry.hash) is not None
        and entry.fate in get_args(Fate)
        and (not entry.used_by or is_public_key(entry.used_by))
    )
