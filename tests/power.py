"""A disk that loses its power: what a program writes is noted, and every cut on its way is tried.

A file system may keep what nobody has synced, lose it, or keep a name and lose the content. What
it may not lose is what `fsync` has returned for: the content of a file, or the names in a folder.
Changes of names in one folder survive in their order, as a journal keeps them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# What survives of changed names that were not synced: none of them, the first half, all.
NAMES = ("none", "half", "all")
# What survives of content that was not synced: nothing of it, its length, a half of it, all.
CONTENTS = ("lost", "zeros", "half", "kept")


@dataclass(eq=False)
class _File:
    """A file or a folder, whatever it is called."""

    is_folder: bool
    content: bytes = b""
    synced: bytes = b""
    names: dict[str, _File] = field(default_factory=dict)
    """What is in a folder for whoever looks now."""
    kept: list[dict[str, _File]] = field(default_factory=list)
    """What was in it when it was synced, and after each change since then."""

    def sync(self) -> None:
        """Let it survive as it is now."""
        self.synced, self.kept = self.content, [self.names]


class Disk:
    """Everything below a folder, as it is and as it would be after a power cut.

    Args:
        root: The folder; what is in it now is durable.
        look: Called at each moment at which the power may be cut.
    """

    def __init__(self, root: Path, look: Callable[[Disk], None]) -> None:
        self.root, self._look = root, look
        self.moments = 0
        """How often the power could have been cut."""
        self._is_looking = False
        self._tree = _File(is_folder=True)
        self._known: dict[int, _File] = {}
        self._observe(self._tree, root)
        for file in (self._tree, *self._known.values()):
            file.sync()

    def _observe(self, folder: _File, path: Path) -> None:
        """Take note of what has become of a folder."""
        names = {}
        for entry in sorted(path.iterdir()):
            number = entry.stat().st_ino
            if number not in self._known:
                self._known[number] = _File(is_folder=entry.is_dir())
                self._known[number].sync()
            file = names[entry.name] = self._known[number]
            if file.is_folder:
                self._observe(file, entry)
            else:
                file.content = entry.read_bytes()
        if names != folder.names:
            folder.names = names
            folder.kept.append(names)

    def _forget_removed(self) -> None:
        """The number of a file that is gone may be that of the next one."""
        here = {entry.stat().st_ino for entry in self.root.rglob("*")}
        self._known = {number: file for number, file in self._known.items() if number in here}

    def moment(self) -> None:
        """Cut the power in thought."""
        if self._is_looking:
            return
        self._observe(self._tree, self.root)
        self._forget_removed()
        self.moments += 1
        self._is_looking = True
        try:
            self._look(self)
        finally:
            self._is_looking = False

    def sync(self, path: Path) -> None:
        """Make what is at *path* durable."""
        if self._is_looking or not (path == self.root or self.root in path.parents):
            return
        self._observe(self._tree, self.root)
        file = self._tree
        for name in path.relative_to(self.root).parts:
            file = file.names[name]
        file.sync()

    def survivors(self, names: str, contents: str) -> dict[str, bytes | None]:
        """Return what such a cut leaves, by relative path; None for a folder."""
        found: dict[str, bytes | None] = {}
        _collect(self._tree, "", (names, contents), found)
        return found


def _collect(
    folder: _File, prefix: str, kind: tuple[str, str], found: dict[str, bytes | None]
) -> None:
    names, contents = kind
    last = len(folder.kept) - 1
    place = {"none": 0, "half": last // 2, "all": last}[names]
    for name, file in folder.kept[place].items():
        path = f"{prefix}{name}"
        found[path] = None if file.is_folder else _left(file, contents)
        if file.is_folder:
            _collect(file, f"{path}/", kind, found)


def _left(file: _File, contents: str) -> bytes:
    """Return what is left of a file's content."""
    if contents == "kept" or file.content == file.synced:
        return file.content
    if contents == "lost":
        return file.synced
    begun = file.synced if file.content.startswith(file.synced) else b""
    more = len(file.content) - len(begun)
    if contents == "zeros":
        return begun + bytes(more)
    return file.content[: len(begun) + more // 2]


@contextmanager
def watching(root: Path, check: Callable[[Path], None], scratch: Path) -> Iterator[Disk]:
    """Let *check* see what each possible power cut would leave of *root*.

    Args:
        root: The folder that the code inside writes to.
        check: Gets a copy of what has survived, which it may change.
        scratch: An empty folder, for the copies.
    """
    seen: set[int] = set()

    def look(disk: Disk) -> None:
        for names in NAMES:
            for contents in CONTENTS:
                found = disk.survivors(names, contents)
                key = hash((disk.moments, *sorted((n, c or b"") for n, c in found.items())))
                if key in seen:
                    continue
                seen.add(key)
                place = scratch / f"{disk.moments}-{names}-{contents}"
                _write(found, place)
                check(place)
                shutil.rmtree(place)

    disk = Disk(root, look)

    def hooked(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            disk.moment()
            found = real(*args, **kwargs)
            if name == "fsync":
                disk.sync(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
            return found

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch:
        hooked(os, "fsync")
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
            hooked(Path, name)
            hooked(os, name)  # for shutil, and for newer versions of pathlib
        yield disk
        disk.moment()


def _write(found: dict[str, bytes | None], place: Path) -> None:
    place.mkdir()
    for name, content in found.items():
        if content is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(content)
