"""Arrays of which two processes hold the very same, by sample: bounded, and kept beyond a restart.

Not here: what is sent against them (`protocol/residual.py`). What was held at the last commit can
be brought back, so that a round that is begun again finds what it found the first time. What is
full takes in no new sample and drops none: a pass through more samples than have room finds the
same part of them each time, where of the least recently used it would never find one.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import StorageError
from edge_sdk.files import PRIVATE, atomic_file, make_private, storage_errors

Halves = NDArray[np.uint16]

log = logging.getLogger(__name__)

# What a sample takes in our tables beside its numbers, roughly.
ENTRY_BYTES = 512
MARK_BYTES = 7
# Sample, mark, positions and hidden size of an array, which follows. Other records begin with what
# is no sample: one that is not held any more, or a commit with the number and the checksum of all
# records since the one before.
_RECORD = struct.Struct("<qQII")
_COMMIT, _GONE = -1, -2
# A log that is so much longer than what is held is written anew.
_MOST_WASTE = 3


class HeldArray(NamedTuple):
    """What is held of a sample."""

    mark: int
    """Hash of the bytes, 1 or more: whoever has the same mark has the same bytes."""
    array_TD: Halves


def mark_of(array_TD: Halves) -> int:
    """Return the mark of an array."""
    digest = hashlib.blake2b(np.ascontiguousarray(array_TD).data, digest_size=MARK_BYTES).digest()
    return int.from_bytes(digest, "little") or 1


class HeldStates:
    """What one side holds of the samples of one device."""

    def __init__(self, limit_bytes: int, path: Path | None = None) -> None:
        """Begin with what the last commit has written to *path*, or with nothing.

        Args:
            limit_bytes: Most bytes of all arrays; as much again for those since the last commit.
            path: Log of what was held, for the next process; None: in memory alone.

        Raises:
            StorageError: its folder cannot be written.
        """
        self._limit_bytes = limit_bytes
        self._now: dict[int, HeldArray] = {}
        self._before: dict[int, HeldArray | None] = {}
        """What was held at the last commit, of samples of which something else is held since."""
        self._step, self._of_step = -1, dict[int, HeldArray | None]()
        """The newest step, and what was held before it, of samples that it has changed."""
        self._num_bytes = 0
        self._committed, self._overtaken = -1, dict[int, HeldArray | None]()
        """Step of the last commit, and what the one before held of samples that it has changed."""
        self._round: int | None = None
        self._log = None if path is None else _Log(path)
        if self._log is not None:
            for sample, held in self._log.read():
                self._set(sample, held)
            self._of_step = {}

    def __len__(self) -> int:
        return len(self._now)

    def get(self, sample: int) -> HeldArray | None:
        """Return what is held of *sample*."""
        return self._now.get(sample)

    def begin_step(self, step: int) -> None:
        """Note which step of the run all that follows belongs to."""
        if step != self._step:
            self._fold()
            self._step = step

    def _fold(self) -> None:
        """Take the newest step for one of those before."""
        self._before = self._of_step | self._before
        self._of_step = {}

    def put(self, sample: int, array_TD: Halves) -> None:
        """Hold *array_TD* of *sample*; without room for it, nothing is held of the sample."""
        self._set(sample, HeldArray(mark_of(array_TD), array_TD))

    def forget(self, samples: Iterable[int]) -> None:
        """Hold nothing of *samples*."""
        for sample in samples:
            self._set(sample, None)

    def _set(self, sample: int, held: HeldArray | None) -> None:
        old = self._now.pop(sample, None)
        self._of_step.setdefault(sample, old)
        self._num_bytes -= _size(old)
        if held is not None and self._num_bytes + _size(held) <= self._limit_bytes:
            self._now[sample] = held
            self._num_bytes += _size(held)

    # ---- rounds ----

    def begin_round(self, number: int, step: int | None = None) -> None:
        """Go back to the last commit where round *number* has been begun before.

        Args:
            number: The round.
            step: Where it begins; where the last commit was of a later step, and one that may fail,
                the one before counts.

        Raises:
            StorageError: the log cannot be written.
        """
        if number == self._round:
            self.roll_back()
            if step is not None and self._committed > step:
                self._restore(self._overtaken)
                if self._log is not None:
                    self._log.append({n: self._now.get(n) for n in sorted(self._overtaken)})
                self._committed, self._overtaken = step, {}
        self._round = number

    def commit(self, step: int, *, goes_on: bool = False, may_fail: bool = False) -> None:
        """Make what is held now that to which `roll_back` returns, and with which others begin.

        Args:
            step: Where the run stands: what has been sent of it, or of a later one, is undone, for
                it will be sent again.
            goes_on: Whether it stays held instead, as the step goes on; it is no part of the commit
                all the same.
            may_fail: Whether the other side may never come to commit: see `begin_round`.

        Raises:
            StorageError: the log cannot be written.
        """
        self.commit_in_memory(step, goes_on=goes_on, may_fail=may_fail)()

    def commit_in_memory(
        self, step: int, *, goes_on: bool = False, may_fail: bool = False
    ) -> Callable[[], None]:
        """Commit for this process; return what writes the log, for any thread; see `commit`.

        Each is called before the next commit.
        """
        is_begun = self._step >= step
        if is_begun and not goes_on:
            self._restore(self._of_step)
            self._of_step = {}
        since = self._of_step if is_begun else {}
        if not is_begun:
            self._fold()
        changed, self._before = self._before, {}
        self._committed, self._overtaken = step, changed if may_fail else {}
        if self._log is None or not changed:
            return _nothing
        then = {**self._now, **since}
        held = {sample: array for sample, array in then.items() if array is not None}
        news = {sample: held.get(sample) for sample in sorted(changed)}
        return partial(_log_commit, self._log, news, held, sum(map(_size, held.values())))

    def roll_back(self) -> None:
        """Hold again what was held at the last commit."""
        self._fold()
        self._restore(self._before)
        self._before = {}

    def _restore(self, before: Mapping[int, HeldArray | None]) -> None:
        for sample in before:
            self._num_bytes -= _size(self._now.pop(sample, None))
        for sample, held in before.items():
            if held is not None:
                self._now[sample] = held
                self._num_bytes += _size(held)


def _size(held: HeldArray | None) -> int:
    return 0 if held is None else held.array_TD.nbytes + ENTRY_BYTES


def _nothing() -> None:
    """Write nothing."""


class _Log:
    """What was held at each commit, one after the other: written in order, as flash likes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(path):
            make_private(path.parent)
            path.touch(PRIVATE)
            self.num_bytes = path.stat().st_size

    def append(self, changed: dict[int, HeldArray | None]) -> None:
        """Add a commit."""
        with storage_errors(self._path), self._path.open("r+b") as file:
            file.truncate(self.num_bytes)  # half a commit of a process that was killed
            file.seek(self.num_bytes)
            self.num_bytes += _write(file, changed)

    def write(self, held: dict[int, HeldArray]) -> None:
        """Write one commit in place of all others."""
        with atomic_file(self._path, what="log of held states") as file:
            self.num_bytes = _write(file, dict(sorted(held.items())))

    def read(self) -> Iterator[tuple[int, HeldArray | None]]:
        """Yield what whole commits say, in their order; what follows a damaged one is dropped."""
        try:
            with self._path.open("rb") as file:
                whole = 0
                while (commit := _read(file)) is not None:
                    whole = file.tell()
                    yield from commit
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from error
        if whole < self.num_bytes:
            log.warning("held.cut path=%s bytes=%d", self._path, self.num_bytes - whole)
        self.num_bytes = whole


def _write(file: BinaryIO, changed: dict[int, HeldArray | None] | dict[int, HeldArray]) -> int:
    """Write a commit; return its bytes."""
    size, check = _RECORD.size * (len(changed) + 1), 0
    for sample, held in changed.items():
        head = _RECORD.pack(_GONE, sample, 0, 0)
        if held is not None:
            head = _RECORD.pack(sample, held.mark, *held.array_TD.shape)
        check = zlib.crc32(head, check)
        file.write(head)
        if held is not None:
            file.write(np.ascontiguousarray(held.array_TD).data)
            size += held.array_TD.nbytes
    file.write(_RECORD.pack(_COMMIT, len(changed), check, 0))
    return size


def _read(file: BinaryIO) -> list[tuple[int, HeldArray | None]] | None:
    """Return the next commit; None where there is none that is whole."""
    found: list[tuple[int, HeldArray | None]] = []
    check = 0
    while len(head := file.read(_RECORD.size)) == _RECORD.size:
        sample, mark, positions, width = _RECORD.unpack(head)
        if sample == _COMMIT:
            return found if (mark, positions) == (len(found), check) else None
        check = zlib.crc32(head, check)
        if sample == _GONE:
            found.append((mark, None))
            continue
        data = file.read(2 * positions * width) if positions * width < 1 << 32 else b""
        if sample < 0 or len(data) != 2 * positions * width:
            return None
        array_TD = np.frombuffer(data, np.uint16).reshape(positions, width)
        if mark_of(array_TD) != mark:
            return None
        found.append((sample, HeldArray(mark, array_TD)))
    return None


def _log_commit(
    log: _Log, news: dict[int, HeldArray | None], held: dict[int, HeldArray], num_bytes: int
) -> None:
    """Write what a commit has changed; all that is *held*, where the log is mostly waste."""
    log.append(news)
    if log.num_bytes > _MOST_WASTE * max(num_bytes, 1 << 20):
        log.write(held)
