"""Message <-> header bytes, strictly: every field is checked against its type before it is used.

Only importer of msgpack. Not here: tensors' bytes (`codecs.py`, `fragments.py`), the frame around
a header (`packets.py`), delivery (`channel.py`).

A header is one msgpack map ``{"v": 1, "type": name, "body": {...}, "tensors": [...]}``. Checks for
a dataclass are built once from its type hints; a hint that this file does not know is a TypeError
at import, so a new message cannot slip through unchecked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.protocol import codecs
from edge_sdk.protocol.messages import MESSAGES, PROTOCOL_VERSION

# Parsed into Python objects before it is checked, so this is what one frame can make us allocate
# (times about 70: msgpack turns one byte into an empty tuple). The largest honest headers are a
# PlanAssigned and a RoundStart of a model with hundreds of adapted weights.
MAX_HEADER_BYTES = 64 * 1024
# A model with 128 blocks, 7 weights each, 4 factors each, has 3584.
MAX_TENSORS = 8192
# Whole-model parameter names; the longest we know have about 90 letters.
MAX_TENSOR_NAME = 256

Plain = Any
Reader = Callable[[Plain, str], Any]
Writer = Callable[[Any, str], Plain]


class TensorSpec(NamedTuple):
    """What the header says about one tensor."""

    name: str
    codec: str
    shape: tuple[int, ...]


# ---- bytes ---------------------------------------------------------------------------------------


def _no_twice(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def pack(value: Plain) -> bytes:
    """Return *value* as msgpack."""
    try:
        return bytes(msgpack.packb(value))
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"cannot be written: {error}") from error


def unpack(data: bytes | memoryview, what: str) -> Plain:
    """Return what one short msgpack object says; lengths are bounded before anything is built."""
    if len(data) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        return msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_no_twice,
            max_str_len=MAX_HEADER_BYTES,
            max_array_len=MAX_TENSORS,
            max_map_len=MAX_TENSORS,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RemoteProtocolError(f"{what} is not msgpack: {error}") from error
    except msgpack.UnpackException as error:
        raise RemoteProtocolError(f"{what} is not msgpack: {error!r}") from error


# ---- types ---------------------------------------------------------------------------------------


def _bad(where: str, due: str, value: Any) -> LocalProtocolError:
    shown = repr(value)
    return LocalProtocolError(f"{where} must be {due}, got {shown[:60]}")


def _check_int(value: Any, where: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _bad(where, "a 64-bit integer", value)
    return value


def _check_float(value: Any, where: str) -> float:
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise _bad(where, "a finite number", value)
    return float(value)


def _check_str(value: Any, where: str) -> str:
    if type(value) is not str:
        raise _bad(where, "a string", value)
    return value


def _check_bool(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _bad(where, "true or false", value)
    return value


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    int: _check_int,
    float: _check_float,
    str: _check_str,
    bool: _check_bool,
}


def _sequence(item: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def check(value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not tuple:
            raise _bad(where, "a list", value)
        return tuple([item(one, where) for one in value])

    return check


def _mapping(item: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def check(value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise _bad(where, "a map", value)
        return {_check_str(key, where): item(one, where) for key, one in value.items()}

    return check


def _optional(item: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def check(value: Any, where: str) -> Any:
        return None if value is None else item(value, where)

    return check


def _checker(hint: Any, of_class: Callable[[type], Callable[[Any, str], Any]]) -> Reader:
    """Return the function that checks a value of *hint*; *of_class* handles dataclasses."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _sequence(_checker(args[0], of_class))
    if origin is dict and args[0] is str:
        return _mapping(_checker(args[1], of_class))
    if origin in (types.UnionType, typing.Union) and len(args) == 2 and args[1] is type(None):
        return _optional(_checker(args[0], of_class))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return of_class(hint)
    raise TypeError(f"{hint!r} cannot travel in a header")


@functools.cache
def _writer(kind: type) -> Writer:
    hints = typing.get_type_hints(kind)
    fields = [(name, _checker(hint, _writer)) for name, hint in hints.items()]

    def write(value: Any, where: str) -> Plain:
        if type(value) is not kind:
            raise _bad(where, kind.__name__, value)
        return {name: check(getattr(value, name), name) for name, check in fields}

    return write


@functools.cache
def _reader(kind: type) -> Reader:
    hints = typing.get_type_hints(kind)
    fields = [(name, _checker(hint, _reader)) for name, hint in hints.items()]
    names = frozenset(hints)

    def read(value: Plain, where: str) -> Any:
        if type(value) is not dict:
            raise _bad(where, f"a map ({kind.__name__})", value)
        if value.keys() != names:
            raise LocalProtocolError(f"{where}: {_difference(names, set(value))}")
        return kind(**{name: check(value[name], f"{where}.{name}") for name, check in fields})

    return read


def _difference(due: frozenset[str], got: set[Any]) -> str:
    missing, unknown = sorted(due - got), sorted(map(repr, got - due))
    parts = [f"missing {', '.join(missing)}"] if missing else []
    return "; ".join(parts + ([f"unknown {', '.join(unknown)[:200]}"] if unknown else []))


def write_fields(value: Any) -> Plain:
    """Return dataclass *value* as plain maps, lists and scalars, each checked against its hint."""
    kind: type = type(value)
    return _writer(kind)(value, kind.__name__)


def read_fields(kind: type, value: Plain, where: str) -> Any:
    """Return the *kind* that the plain *value* stands for; blames the peer."""
    try:
        return _reader(kind)(value, where)
    except LocalProtocolError as error:
        raise RemoteProtocolError(str(error)) from error


# ---- headers -------------------------------------------------------------------------------------


def encode_header(message: Any, tensors: tuple[TensorSpec, ...] = ()) -> bytes:
    """Return the header of *message*; what the protocol forbids is a LocalProtocolError."""
    kind = type(message).__name__
    if MESSAGES.get(kind) is not type(message):
        raise LocalProtocolError(f"{kind} is not a message of the protocol")
    body = write_fields(message)
    table = _write_table(tensors) if tensors else []
    data = pack({"v": PROTOCOL_VERSION, "type": kind, "body": body, "tensors": table})
    if len(data) > MAX_HEADER_BYTES:
        raise LocalProtocolError(
            f"header of {kind} takes {len(data)} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    return data


def decode_header(data: bytes | memoryview) -> tuple[Any, tuple[TensorSpec, ...]]:
    """Return the message and its tensors' specs, or raise RemoteProtocolError; nothing else."""
    header = unpack(data, "header")
    if type(header) is not dict or "v" not in header:
        raise RemoteProtocolError("header is not a map with a version")
    if type(header["v"]) is not int or header["v"] != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"protocol version {str(header['v'])[:20]!r}, this side speaks {PROTOCOL_VERSION}"
        )
    if header.keys() != {"v", "type", "body", "tensors"}:
        raise RemoteProtocolError(f"header has the fields {str(sorted(map(repr, header)))[:200]}")
    kind = MESSAGES.get(header["type"]) if type(header["type"]) is str else None
    if kind is None:
        raise RemoteProtocolError(f"unknown message type {str(header['type'])[:60]!r}")
    message = read_fields(kind, header["body"], kind.__name__)
    try:
        return message, _read_table(header["tensors"])
    except LocalProtocolError as error:
        raise RemoteProtocolError(f"{kind.__name__}: {error}") from error


def _write_table(tensors: tuple[TensorSpec, ...]) -> Plain:
    """Front-coded: neighbours share most of a long name, and a header holds thousands of them."""
    if len(tensors) > MAX_TENSORS:
        raise LocalProtocolError(f"{len(tensors)} tensors, at most {MAX_TENSORS} are allowed")
    numbers = {name: number for number, name in enumerate(codecs.CODECS)}
    table, last = [], ""
    for name, codec, shape in tensors:
        if len(name) > MAX_TENSOR_NAME:
            raise LocalProtocolError(f"tensor name of {len(name)} letters: {name[:60]!r}...")
        shared = 0
        for ours, theirs in zip(name, last, strict=False):
            if ours != theirs:
                break
            shared += 1
        table.append((shared, name[shared:], numbers[codec], shape))
        last = name
    return table


def _read_table(table: Plain) -> tuple[TensorSpec, ...]:
    if type(table) is not tuple:
        raise _bad("tensors", "a list", table)
    specs: list[TensorSpec] = []
    seen: set[str] = set()
    last, names = "", tuple(codecs.CODECS)
    for row in table:
        if type(row) is not tuple or len(row) != 4:
            raise _bad("tensor", "(shared, suffix, codec, shape)", row)
        shared, number = _check_int(row[0], "tensor.shared"), _check_int(row[2], "tensor.codec")
        if not 0 <= shared <= len(last):
            raise _bad("tensor.shared", f"0 .. {len(last)}", shared)
        name = last = last[:shared] + _check_str(row[1], "tensor.name")
        if name in seen or len(name) > MAX_TENSOR_NAME:
            raise _bad("tensor.name", "new and short", name)
        if not 0 <= number < len(names):
            raise _bad("tensor.codec", f"0 .. {len(names) - 1}", number)
        seen.add(name)
        specs.append(_spec(name, names[number], row[3]))
    return tuple(specs)


def _spec(name: str, codec: str, dims: Plain) -> TensorSpec:
    if type(dims) is not tuple or len(dims) > codecs.MAX_DIMENSIONS:
        raise _bad(f"shape of {name!r}", f"at most {codecs.MAX_DIMENSIONS} sizes", dims)
    for size in dims:
        if type(size) is not int or size < 0:
            raise _bad(f"shape of {name!r}", "non-negative integers", dims)
    return TensorSpec(name, codec, dims)


for _kind in MESSAGES.values():  # a hint nobody can check fails here, not in the field
    _reader(_kind)
    _writer(_kind)
