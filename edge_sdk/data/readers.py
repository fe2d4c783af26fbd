"""Records of any source - files, the Hugging Face hub, memory - each with its origin.

What a record must hold is decided in schemas.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from edge_sdk.data.formats import Records, chosen_columns, file_records
from edge_sdk.data.paths import data_files
from edge_sdk.errors import DataError


@runtime_checkable
class Indexable(Protocol):
    """Anything shaped like a ``torch.utils.data.Dataset`` whose items are dictionaries."""

    def __len__(self) -> int:
        """Return the number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """Return item *index*, a dictionary."""


RowSource = str | Path | Sequence[str | Path] | Indexable | Iterable[Mapping[str, Any]]


def source_name(source: RowSource) -> str:
    """Return how messages call *source*."""
    if isinstance(source, (str, Path)):
        return str(source)
    if (several := _several(source)) is not None:
        return ", ".join(map(str, several[:3])) + (", ..." if len(several) > 3 else "")
    return type(source).__name__


def _several(source: RowSource) -> list[str | Path] | None:
    """Return the files of a list of them, None if the items of *source* are the rows themselves."""
    if not isinstance(source, (list, tuple)) or not source:
        return None
    files = [one for one in source if isinstance(one, (str, Path))]
    return files if len(files) == len(source) else None


def read_records(
    source: RowSource, wanted: Collection[str], name: str | None = None, split: str = "train"
) -> Records:
    """Yield ``(where, record)`` of any source.

    Args:
        source: A file, a pattern, a folder, a list of these; the id of a Hugging Face data set or
            a folder in its format; an iterable of records, or anything with ``len`` and ``[]``.
        wanted: Columns that a row may use. Others stay unread where the format allows it, so
            that images and blobs cost nothing.
        name: Configuration of a Hugging Face data set.
        split: Split of a Hugging Face data set, or of a folder whose file names tell it.

    Raises:
        DataError: Nothing there, unreadable, or not of the format that its name promises.
    """
    paths = source if isinstance(source, (str, Path)) else _several(source)
    if paths is not None:
        files = data_files(paths, split)
        if files:
            return chain.from_iterable(file_records(path, wanted) for path in files)
        return _hub_records(str(source), wanted, name, split)
    if isinstance(source, Mapping):
        raise DataError(f"{type(source).__name__}: holds {sorted(map(str, source))}; pass one")
    if isinstance(source, Indexable):
        return ((f"row:{i + 1}", source[i]) for i in range(len(source)))
    if isinstance(source, Iterable):
        return ((f"row:{i}", record) for i, record in enumerate(source, start=1))
    raise DataError(f"{type(source).__name__}: not a path, an iterable or a data set")


def _hub_records(path: str, wanted: Collection[str], name: str | None, split: str) -> Records:
    """Yield the rows of a Hugging Face data set; HF_HUB_OFFLINE=1 keeps it to the cache."""
    try:
        import datasets  # here, not above: slow to import, and optional
    except ImportError as error:
        raise DataError(f"{path}: data set ids need `pip install edgesplit[data]`") from error
    try:
        rows = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise DataError(f"{path}: no such file or data set ({reason})") from error
    rows = rows.select_columns(chosen_columns(rows.column_names, wanted))
    for number, record in enumerate(rows, start=1):
        yield f"{path}[{split}]:{number}", record
