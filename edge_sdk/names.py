"""Names and sizes that come from the other side: what each may be, before it is used for anything.

A name is no path: it names one file or folder below one that we chose ourselves. Reading a message
holds every field to its form (`protocol/headers.py`); whoever makes a path of a name uses `inside`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NamedTuple

from edge_sdk.errors import RemoteProtocolError

# A file system takes 255 bytes for a name; some are given an ending of ours.
MAX_NAME = 80
MAX_FOLDER_BYTES = 200
# A part of a model: twice the largest known layer of experts. Whoever wants less says so.
MAX_PART_BYTES = 1 << 36


class Matching(NamedTuple):
    """A text that the whole of a pattern describes."""

    pattern: str


class Between(NamedTuple):
    """A number that has bounds, both included."""

    least: int
    most: int


RunName = Annotated[str, Matching(rf"(?:[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}})?")]
"""Name of a run or of a device; empty where there is none yet."""
Sha256 = Annotated[str, Matching("[0-9a-f]{64}")]
"""A hash, as text."""
ModelHash = Annotated[str, Matching("(?:[0-9a-f]{64})?")]
"""Hash of a model; empty for any."""
PartName = Annotated[str, Matching(r"files|front|block\.[0-9]{1,5}|tail|graphs")]
"""Name of a part of a model."""
PartBytes = Annotated[int, Between(0, MAX_PART_BYTES)]
"""Size of a part, or a place in it."""


def check_folder_name(name: str | None) -> None:
    """Refuse a *name* that a person has given and that is not that of one folder; None is any.

    Raises:
        ValueError: it is a path, hidden, cannot be printed, or is too long for a file system.
    """
    if name is None:
        return
    is_plain = bool(name) and name.isprintable() and not name.startswith((".", "-", " "))
    if not is_plain or "/" in name or "\\" in name or len(name.encode()) > MAX_FOLDER_BYTES:
        raise ValueError(
            f"name must be that of one folder: without '/', '.' at its beginning and what cannot "
            f"be printed, at most {MAX_FOLDER_BYTES} bytes, got {name[:MAX_NAME]!r}"
        )


def run_name(text: str) -> str:
    """Return *text* as the name of a run on the wire: other letters than a name's become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip(".")[:MAX_NAME]


def inside(folder: Path, *names: str) -> Path:
    """Return the path of *names* below *folder*, each of them one file or folder.

    Raises:
        RemoteProtocolError: one is no plain name, or what lies there leads out of the folder.
    """
    path = folder
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise RemoteProtocolError(f"{name[:MAX_NAME]!r} is no name of a file")
        path = path / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RemoteProtocolError(f"{'/'.join(names)[:MAX_NAME]!r} leads out of its folder")
    return path
