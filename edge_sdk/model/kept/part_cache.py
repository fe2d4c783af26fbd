"""Parts of models on disk: whole ones under their hashes, and what of others has come so far.

Knows no model and no network.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from edge_sdk.errors import ModelError, StorageError
from edge_sdk.files import atomic_file, identity, make_folder, storage_errors, sync
from edge_sdk.home import cache_folder
from edge_sdk.model.safetensors_files import Sink
from edge_sdk.names import inside
from edge_sdk.protocol.plan import Part

log = logging.getLogger(__name__)

# A cache may be that of all users of a machine: models are no secret.
SHARED = 0o666
# What a download leaves free on the disk of whoever fetches it.
SPARE_BYTES = 16 << 20


class PartCache:
    """Parts on disk under their hashes; partial downloads are kept and continued."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "edgesplit" / "parts"
        self._checked: dict[str, tuple[int, ...]] = {}
        """What files look like whose hash this process has seen to be right."""

    def path(self, part: Part) -> Path:
        """Return where *part* lies once it is complete."""
        return inside(self.folder, f"{part.sha256}.safetensors")

    def has(self, part: Part) -> bool:
        """Return whether *part* is complete and whole.

        The hash of a file is computed once in a process, and again when the file has changed. One
        that is damaged is thrown away: its content can be had again.
        """
        path = self.path(part)
        try:
            now = identity(path)
            if self._checked.get(part.sha256) == now:
                return True
            with path.open("rb") as file:
                found = _digest(file) if now[1] == part.num_bytes else ""
            if found == part.sha256:
                self._checked[part.sha256] = now
                return True
            log.warning("part.damaged name=%s file=%s; it is fetched again", part.name, path)
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        return False

    def received(self, part: Part) -> int:
        """Return the bytes of *part* that an interrupted download has left."""
        try:
            return self._partial(part).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0  # not begun, or another device of this machine has finished it

    def check_room(self, part: Part) -> None:
        """Refuse to go on with a download that the disk cannot take.

        Raises:
            StorageError: too little is free; nothing more is asked for.
        """
        with storage_errors(f"part {part.name!r} to {self.folder}"):
            make_folder(self.folder)
            free = shutil.disk_usage(self.folder).free
        if (left := part.num_bytes - self.received(part)) > free - SPARE_BYTES:
            raise StorageError(
                f"part {part.name!r} needs {left} bytes more in {self.folder}, where {free} are "
                "free; make room, or let `cache` name another folder"
            )

    def append(self, part: Part, offset: int, data: memoryview | bytes) -> None:
        """Add a stretch of *part*; what is there already is written again with the same bytes.

        Several devices of one machine may fetch the same part into the same folder at once: a
        stretch that would leave a hole, as another of them has just finished the file, is dropped.
        """
        with storage_errors(f"part {part.name!r} to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            how = os.O_WRONLY | (0 if offset else os.O_CREAT)
            try:
                handle = os.open(self._partial(part), how, SHARED)
            except FileNotFoundError:
                return
            with open(handle, "wb") as file:
                if offset <= os.fstat(handle).st_size:
                    file.seek(offset)
                    file.write(data)

    def finish(self, part: Part) -> Path:
        """Check the hash of a complete download and move it into place.

        Where another device of this machine has done so, and has begun anew, it is dropped.

        Raises:
            ModelError: the bytes are not those of the part; they are thrown away.
        """
        partial, path = self._partial(part), self.path(part)
        own = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with partial.open("rb") as file:
                checked, found = os.fstat(file.fileno()), _digest(file)
                os.fsync(file.fileno())  # a name must not survive a power cut without its content
            # Another device may put another file in its place meanwhile, but not in that of `own`.
            partial.replace(own)
            is_others = checked.st_size < part.num_bytes or own.stat().st_ino != checked.st_ino
            if is_others or found != part.sha256:
                own.unlink()
            else:
                own.replace(path)
                sync(path.parent)
                self._checked[part.sha256] = identity(path)
            if is_others or found == part.sha256:
                return path
        except FileNotFoundError:  # another device of this machine was faster
            return path
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise ModelError(
            f"part {part.name!r} arrived damaged: sha256 {found[:12]}..., "
            f"expected {part.sha256[:12]}...; start again to fetch it again"
        )

    def store(self, part: Part, data: bytes) -> Path:
        """Put a whole part into the cache."""
        return self.fill(part, lambda file: file.write(data))

    def fill(self, part: Part, write: Callable[[Sink], object]) -> Path:
        """Put a whole part into the cache, which *write* writes to a file.

        Raises:
            ModelError: what was written is another part.
        """
        with atomic_file(self.path(part), mode=SHARED) as file:
            digest = hashlib.sha256()
            write(_Both(file, digest.update))
            if digest.hexdigest() != part.sha256:
                raise ModelError(
                    f"part {part.name!r} is no longer what it was: sha256 "
                    f"{digest.hexdigest()[:12]}..., expected {part.sha256[:12]}...; the model's "
                    "files have changed, start again"
                )
        self._checked[part.sha256] = identity(self.path(part))
        return self.path(part)

    def _partial(self, part: Part) -> Path:
        return inside(self.folder, f"{part.sha256}.partial")


class _Both:
    """A file and a hash of what is written to it."""

    def __init__(self, file: BinaryIO, update: Callable[[Any], None]) -> None:
        self._file, self._update = file, update

    def write(self, data: Any) -> None:
        """Take *data* in."""
        self._update(data)
        self._file.write(data)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
