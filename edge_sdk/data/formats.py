"""Records of one file - JSON Lines, JSON, CSV, TSV, Parquet; packed or not - with their lines.

Nothing is held but the record that is being read. What is wrong with one record takes its place, so
that a reader may go on behind it; what is wrong with the file is raised.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from edge_sdk.data.paths import kind_of
from edge_sdk.errors import DataError

Records = Iterator[tuple[str, Any]]
"""Pairs ``(where, record)``: ``file:line``, lines counted from 1, and hopefully a dictionary; or
the `DataError` that says what is wrong there, where reading can go on behind it."""
GZIP = b"\x1f\x8b"
CHUNK = 1 << 16  # bytes of a JSON file that are read at once
# What may be the last letters of an unfinished literal, number or escape.
UNFINISHED = 16
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
LATIN = "if the file is Latin-1, `iconv -f WINDOWS-1252 -t UTF-8` converts it"


def file_records(path: Path, wanted: Collection[str]) -> Records:
    """Yield the records of one file, whatever its kind.

    Args:
        path: The file; its name says its kind, its first bytes whether it is packed by gzip.
        wanted: Columns to read where the format allows it.

    Raises:
        DataError: Unreadable, cut, or not of the format that its name promises.
    """
    last = str(path)
    try:
        if (kind := kind_of(path)) == ".parquet":
            yield from _parquet_records(path, wanted)
            return
        with path.open("rb") as raw:
            # By its first bytes: browsers unpack files and leave them their name.
            file: Any = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP else raw
            for last, record in _text_records(path, file, kind):
                yield last, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        behind = f", behind {last}" if last != str(path) else ""
        raise DataError(f"{path}: the gzip file is cut or damaged{behind}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _text_records(path: Path, file: IO[bytes], kind: str | None) -> Records:
    match kind:
        case ".json":
            return _json_records(path, file)
        case ".csv" | ".tsv":
            return _csv_records(path, _Lines(path, file), kind)
        case _:
            return _jsonl_records(path, _Lines(path, file))


class _Lines:
    """The lines of a UTF-8 file with their ends; a byte order mark is dropped."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._error: DataError | None = None
        self.number = 0
        """Lines that were read."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        if self.number == 1:
            _refuse_utf16(self._path, line)
        encoding = "utf-8-sig" if self.number == 1 else "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} is not UTF-8; {LATIN}"
            self._error = self._error or DataError(f"{self._path}:{self.number}: {what}")
            return line.decode(encoding, "replace")

    def take_error(self) -> DataError | None:
        """Return what was wrong with the lines since the last call."""
        error, self._error = self._error, None
        return error


def _refuse_utf16(path: Path, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}:1: is UTF-16; save it as UTF-8")


def _mistake(error: json.JSONDecodeError, begin: int = 0) -> str:
    """Return what is wrong with a value that begins at *begin*, and the column where it begins.

    A string without an end is noticed where its line ends: what counts is where it begins.
    """
    text, at, what = error.doc, error.pos, error.msg
    if what.startswith("Invalid control character") and text[at] in "\r\n":
        try:
            DECODER.raw_decode(text[:at], SPACE.match(text, begin).end())  # type: ignore[union-attr]
        except json.JSONDecodeError as earlier:
            at, what = earlier.pos, earlier.msg
    column = at - text.rfind("\n", 0, at)
    what = what.removesuffix(" at").removesuffix(" starting")
    return f"{what} at column {column}" + (", where the line ends" if at >= len(text) else "")


def _jsonl_records(path: Path, lines: _Lines) -> Records:
    """Yield the values of a JSON Lines file; blank lines are skipped."""
    for line in lines:
        where = f"{path}:{lines.number}"
        if (wrong := lines.take_error()) is not None:
            yield where, wrong
        elif line.strip():
            try:
                yield where, json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: not JSON: {_mistake(error)}")
            except (ValueError, RecursionError):  # huge numbers, endless nesting
                yield where, DataError(f"{where}: not usable JSON")


# ---- JSON ----------------------------------------------------------------------------------------


class _Stream:
    """The text of a JSON file, read as far as the next value needs it."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._is_over = "", 0, False
        self.line = 1
        """Line in which the next letter stands, from 1."""

    def _more(self) -> None:
        """Read as much again as is held, so that a long value is not tried too often."""
        data = self._file.read(max(CHUNK, len(self._text) - self._at))
        if self.line == 1 and not self._text:
            _refuse_utf16(self._path, data)
        self._is_over = not data
        held = self._text[self._at :]
        try:
            self._text, self._at = held + self._decode(data, self._is_over), 0
        except UnicodeDecodeError as error:
            line = self.line + held.count("\n") + data[: error.start].count(b"\n")
            raise DataError(f"{self._path}:{line}: is not UTF-8; {LATIN}") from error

    def _go(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def letter(self) -> str:
        """Return the next letter that is no space, without passing it; empty at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            self._go(self._at if space is None else space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_over:
                return ""
            self._more()

    def step(self) -> None:
        """Pass one letter."""
        self._go(self._at + 1)

    def step_line(self) -> None:
        """Pass the rest of this line."""
        while (end := self._text.find("\n", self._at)) < 0 and not self._is_over:
            self._go(len(self._text))
            self._more()
        self._go(len(self._text) if end < 0 else end + 1)

    def value(self, where: str) -> Any:
        """Return the value that begins here, and pass it."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_unfinished = (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(self._text) - UNFINISHED
                )
                if self._is_over or not is_unfinished:
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    what = f"{where}: not JSON: in line {line}, {_mistake(error, self._at)}"
                    raise DataError(what) from error
            except (ValueError, RecursionError) as error:  # huge numbers, endless nesting
                raise DataError(f"{where}: not usable JSON") from error
            else:
                if end < len(self._text) or self._is_over:  # else a number may go on
                    self._go(end)
                    return value
            self._more()


def _json_records(path: Path, file: IO[bytes]) -> Records:
    """Yield the items of a list, or values one after the other, as JSON Lines under this name."""
    stream, number = _Stream(path, file), 0
    is_list = stream.letter() == "["
    if is_list:
        stream.step()
    while (letter := stream.letter()) and not (is_list and letter == "]"):
        if is_list and number:
            if letter != ",":
                what = f"a comma is missing behind item {number}"
                raise DataError(f"{path}:{stream.line}: not JSON: {what}")
            stream.step()
            stream.letter()
        number += 1
        where = f"{path}:{stream.line} (item {number})"
        try:
            value = stream.value(where)
        except DataError as error:
            if is_list:  # behind a mistake nobody knows where the next item begins
                raise
            value = error
            stream.step_line()
        yield where, value
    if not is_list:
        return
    if not letter:
        raise DataError(f"{path}:{stream.line}: not JSON: the file ends before its list does")
    stream.step()
    if stream.letter():
        raise DataError(f"{path}:{stream.line}: not JSON: something follows the list")


# ---- tables --------------------------------------------------------------------------------------


def _csv_records(path: Path, lines: _Lines, kind: str) -> Records:
    """Yield the rows of a table by the names in its first line."""
    head = next(lines, "")
    delimiter = "\t" if kind == ".tsv" else _delimiter(head)
    if head.lower().startswith("sep="):  # Excel's own way to say it
        head = next(lines, "")
    reader = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = lines.number  # where the current row begins: a quoted cell may run over several lines
    while True:
        where = f"{path}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            wrong = DataError(f"{where}: not CSV: {error}")
            if lines.number != line or not header:  # an open quote may hold any number of rows
                raise wrong from error
            yield where, lines.take_error() or wrong
        else:
            if cells is None:
                return
            wrong_line = lines.take_error()
            if header and cells:
                yield where, wrong_line or _csv_row(header, cells, where)
            elif cells:
                if wrong_line is not None:
                    raise wrong_line
                header = _header(cells, where)
        line = lines.number + 1


def _delimiter(head: str) -> str:
    """Return what parts the cells of a table with that first line: a comma where there is one."""
    if head.lower().startswith("sep=") and len(head.strip()) == 5:
        return head[4]
    bare = re.sub(r'"[^"]*"?', "", head)
    return next((letter for letter in ",;\t|" if letter in bare), ",")


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names):
        raise DataError(f"{where}: a column name appears twice")
    return names


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, str] | DataError:
    """Return *cells* by name, if there are as many as columns."""
    if len(cells) != len(header):
        counts = f"{len(cells)} cells under {len(header)} columns"
        return DataError(f"{where}: {counts}; is a quote missing?")
    return dict(zip(header, cells, strict=True))


def chosen_columns(columns: list[str], wanted: Collection[str]) -> list[str]:
    """Return the columns to read: all of them where none is wanted, for the message's sake."""
    return [column for column in columns if column in wanted] or columns


def _parquet_records(path: Path, wanted: Collection[str]) -> Records:
    """Yield the rows of a Parquet file; they are numbered from 1 in place of lines."""
    try:
        import pyarrow as pa  # here, not above: a device with JSONL needs no pyarrow
        from pyarrow import parquet
    except ImportError as error:
        remedy = "`pip install edgesplit[data]`, or the file as .jsonl"
        raise DataError(f"{path}: reading Parquet needs {remedy}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = chosen_columns(file.schema_arrow.names, wanted)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except pa.ArrowException as error:
        raise DataError(f"{path}:{number + 1}: not readable as Parquet") from error
