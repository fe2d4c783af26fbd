"""Which files a path means: one, several, a pattern, or those of a folder; always in one order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import DataError

FILE_SUFFIXES = (".jsonl", ".csv", ".parquet", ".json", ".tsv", ".ndjson")
# Names that end like these are files of the wrong kind, not data sets on the hub.
OTHER_SUFFIXES = (".txt", ".xlsx", ".arrow", ".gz", ".zip", ".tar", ".xz", ".bz2", ".zst", ".yaml")
PACKED = ".gz"
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
# What file names call the parts of a data set.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
ALLOWED = f"must end in one of {', '.join(FILE_SUFFIXES)}, or in one of these and {PACKED}"


def kind_of(path: Path) -> str | None:
    """Return which of FILE_SUFFIXES the name of *path* has, packed or not; None: none of them."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(PACKED)).suffix
    if suffix == ".parquet" and name.endswith(PACKED):
        return None
    return suffix if suffix in FILE_SUFFIXES else None


def data_files(source: str | Path | Sequence[str | Path], split: str = "train") -> list[Path]:
    """Return the files that *source* means, none where it is the id of a data set.

    Patterns (`*`, `?`, `[...]`, and `**` for folders in folders) and folders give their files by
    name. Of a folder in which names tell the parts of a data set, those of *split* are taken; files
    that tell none count as training data. A folder in the form of the Hugging Face hub is a data
    set, not files.

    Raises:
        DataError: No such file, no match, a file of another kind, or an id among several files.
    """
    if isinstance(source, (str, Path)):
        return _files(source, split)
    found: list[Path] = []
    for one in source:
        files = _files(one, split)
        if not files:
            raise DataError(f"{one}: no such file; several sources must all be files")
        found += files
    return list(dict.fromkeys(found))


def _files(source: str | Path, split: str) -> list[Path]:
    if not str(source):
        raise DataError("'': no such file, and not the id of a data set")
    path = Path(os.path.expanduser(source))  # leaves the ~ of somebody unknown as it is
    if path.is_dir() and kind_of(path) is None:
        return _in_folder(path, split)
    if glob.has_magic(str(path)) and not path.exists():
        return _matches(path)
    if kind_of(path) is not None:
        return [path]
    if path.is_file() or path.suffix.lower() in OTHER_SUFFIXES:
        raise DataError(f"{source}: {ALLOWED}")
    if not HUB_ID.fullmatch(str(source)):
        raise DataError(f"{str(source)!r}: no such file, and not the id of a data set")
    return []


def _matches(pattern: Path) -> list[Path]:
    """Return the data files that fit *pattern*; others that fit, such as a README, are no data."""
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"{pattern}: no file fits this pattern")
    data = [path for path in files if kind_of(path) is not None]
    if not data:
        raise DataError(f"{pattern}: {files[0].name} fits, but {ALLOWED}")
    return data


def _in_folder(folder: Path, split: str) -> list[Path]:
    """Return the data files of *folder* that belong to *split*; none for a data set of the hub."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    seen = [path for path in inside if not path.name.startswith(".") and path.is_file()]
    files = [path for path in seen if kind_of(path) is not None]
    if not files or not split.isidentifier() or _has_card(folder):
        return []
    parts = {path: _part_of(path) for path in files}
    wanted = SPLITS.get(split, split)
    chosen = [p for p in files if parts[p] == wanted or (parts[p] is None and wanted == "train")]
    if not chosen:
        names = ", ".join(path.name for path in files[:5])
        raise DataError(f"{folder}: no file of the split {split!r}; there are {names}")
    return chosen


def _part_of(path: Path) -> str | None:
    """Return the part of a data set that a file's name tells."""
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _has_card(folder: Path) -> bool:
    """Return whether the folder's README is a card that says which files are what."""
    try:
        with (folder / "README.md").open("rb") as file:
            return file.read(3) == b"---"
    except OSError:
        return False
