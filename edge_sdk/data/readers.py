"""Records of any source - JSON Lines, CSV, Parquet, the Hugging Face hub, memory - with origins.

Knows formats and line numbers; what a record must hold is decided in rows.py.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from edge_sdk.errors import DataError

FILE_SUFFIXES = (".jsonl", ".csv", ".parquet")
# Names that end like these are files of the wrong kind, not data sets on the hub.
OTHER_SUFFIXES = (".json", ".txt", ".tsv", ".xlsx", ".gz", ".zip", ".arrow", ".ndjson", ".xz")
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@runtime_checkable
class Indexable(Protocol):
    """Anything shaped like a ``torch.utils.data.Dataset`` whose items are dictionaries."""

    def __len__(self) -> int:
        """Return the number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """Return item *index*, a dictionary."""


RowSource = str | Path | Indexable | Iterable[Mapping[str, Any]]
Records = Iterator[tuple[str, Any]]
"""Pairs ``(where, record)``: ``file:line``, lines counted from 1, and hopefully a dictionary; or
the `DataError` that says what is wrong there, where reading can go on behind it."""


def source_name(source: RowSource) -> str:
    """Return how messages call *source*."""
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def read_records(
    source: RowSource, wanted: Collection[str], name: str | None = None, split: str = "train"
) -> Records:
    """Yield ``(where, record)`` of any source.

    Args:
        source: A file, the id of a Hugging Face data set or a folder in its format, an iterable
            of records, or anything with ``len`` and ``[]``.
        wanted: Columns that a row may use. Others stay unread where the format allows it, so
            that images and blobs cost nothing.
        name: Configuration of a Hugging Face data set.
        split: Split of a Hugging Face data set.

    Raises:
        DataError: Nothing there, unreadable, or not of the format that its name promises.
    """
    if isinstance(source, (str, Path)):
        path = Path(os.path.expanduser(source))  # leaves the ~ of somebody unknown as it is
        if path.suffix.lower() in FILE_SUFFIXES:
            return _file_records(path, wanted)
        if path.is_file() or path.suffix.lower() in OTHER_SUFFIXES:
            raise DataError(f"{source}: must end in one of {', '.join(FILE_SUFFIXES)}")
        if source == "" or not path.is_dir() and not HUB_ID.fullmatch(str(source)):
            raise DataError(f"{str(source)!r}: no such file, and not the id of a data set")
        return _hub_records(str(source), wanted, name, split)
    if isinstance(source, Mapping):
        raise DataError(f"{type(source).__name__}: holds {sorted(map(str, source))}; pass one")
    if isinstance(source, Indexable):
        return ((f"row:{i + 1}", source[i]) for i in range(len(source)))
    if isinstance(source, Iterable):
        return ((f"row:{i}", record) for i, record in enumerate(source, start=1))
    raise DataError(f"{type(source).__name__}: not a path, an iterable or a data set")


def _file_records(path: Path, wanted: Collection[str]) -> Records:
    """Yield the records of one file, whatever its kind."""
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _jsonl_records(path)
            case ".csv":
                yield from _csv_records(path)
            case _:
                yield from _parquet_records(path, wanted)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends; a byte order mark is dropped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path}:1: is UTF-16; save it as UTF-8")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                column = error.start + 1
                raise DataError(f"{path}:{number}: byte {column} is not UTF-8") from error


def _jsonl_records(path: Path) -> Records:
    """Yield the values of a JSON Lines file; blank lines are skipped."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            where = f"{path}:{number}"
            raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # huge numbers, endless nesting
            raise DataError(f"{path}:{number}: not usable JSON") from error
        yield f"{path}:{number}", record


def _csv_records(path: Path) -> Records:
    """Yield the rows of a comma-separated file by the names in its first line."""
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    line = 1  # where the current row begins: a quoted cell may run over several lines
    try:
        for cells in reader:
            if cells and header:
                yield f"{path}:{line}", _csv_row(header, cells, f"{path}:{line}")
            elif cells:
                header = cells
                if len(set(header)) != len(header):
                    raise DataError(f"{path}:{line}: a column name appears twice")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    """Return *cells* by name, if there are as many as columns."""
    if len(cells) != len(header):
        counts = f"{len(cells)} cells under {len(header)} columns"
        raise DataError(f"{where}: {counts}; is a quote missing?")
    return dict(zip(header, cells, strict=True))


def _chosen(columns: list[str], wanted: Collection[str]) -> list[str]:
    """Return the columns to read: all of them where none is wanted, for the message's sake."""
    return [column for column in columns if column in wanted] or columns


def _parquet_records(path: Path, wanted: Collection[str]) -> Records:
    """Yield the rows of a Parquet file; they are numbered from 1 in place of lines."""
    try:
        import pyarrow as pa  # here, not above: a device with JSONL needs no pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs `pip install edgesplit[data]`") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = _chosen(file.schema_arrow.names, wanted)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except pa.ArrowException as error:
        raise DataError(f"{path}:{number + 1}: not readable as Parquet") from error


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
    rows = rows.select_columns(_chosen(rows.column_names, wanted))
    for number, record in enumerate(rows, start=1):
        yield f"{path}[{split}]:{number}", record
