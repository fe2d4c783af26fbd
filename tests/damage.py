"""Ways in which a file on a disk is no longer what was written, for tables of tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit, at that share of the file's length."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cut the second half off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    """Add a byte."""
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path: Path) -> None:
    """Leave nothing of its content."""
    path.write_bytes(b"")


def zero(path: Path) -> None:
    """Leave its length only, as some file systems do after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path) -> None:
    """Leave nothing of it."""
    path.unlink()


def become_a_folder(path: Path) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def become_text(path: Path) -> None:
    """Put something else in its place."""
    path.write_bytes(b'{"a": 1}\n')


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit near its start": lambda path: flip(path, 0.02),
    "a bit in the middle": flip,
    "its last bit": lambda path: flip(path, 1.0),
    "cut off": cut,
    "a byte more": grow,
    "emptied": empty,
    "zeros": zero,
    "missing": remove,
    "a folder": become_a_folder,
    "another file": become_text,
}


def replace_by(other: Path) -> Callable[[Path], None]:
    """Put the whole content of *other*, itself undamaged, in its place."""
    return lambda path: shutil.copyfile(other, path) and None
