"""Message <-> header bytes, strictly: every field is checked against its type before it is used.

Only importer of msgpack. Not here: tensors' bytes (`codecs.py`, `fragments.py`), the frame around
a header (`packets.py`), delivery (`channel.py`).

A header is one msgpack map ``{"v": 1, "type": name, "body": {...}, "tensors": [...]}``. msgspec
checks it against a strict form of the dataclass: every field that has no default, no conversion
from one type to another, integers of 64 bits, finite numbers, and the forms of `edge_sdk/names.py`.

What a newer version of the same protocol adds is an optional field: readers pass over fields that
they do not know, and take the default of those that are missing. ``v`` grows when that is not
enough, and no side reads a header of another ``v``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
import typing
from typing import Annotated, Any, NamedTuple

import msgpack
import msgspec
from msgspec import Meta

from edge_sdk.errors import MAX_TEXT, LocalProtocolError, RemoteProtocolError, public_text
from edge_sdk.names import Between, Matching
from edge_sdk.protocol import codecs
from edge_sdk.protocol.messages import (
    FROM_COORDINATOR,
    FROM_DEVICE,
    MESSAGES,
    PROTOCOL_VERSION,
)

# Parsed into Python objects before it is checked, so this is what one frame can make us allocate
# (times about 70: msgpack turns one byte into an empty tuple). The largest honest headers are a
# PlanAssigned and a RoundStart of a model with hundreds of adapted weights.
MAX_HEADER_BYTES = 64 * 1024
# A model with 128 blocks, 7 weights each, 4 factors each, has 3584.
MAX_TENSORS = 8192
# Whole-model parameter names; the longest we know have about 90 letters.
MAX_TENSOR_NAME = 256

Plain = Any


class TensorSpec(NamedTuple):
    """What the header says about one tensor."""

    name: str
    codec: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """The dtype of the array that this becomes."""
        return codecs.CODECS[self.codec].array


# ---- bytes ---------------------------------------------------------------------------------------


def _no_twice(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


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


_SCALARS: dict[Any, Any] = {
    int: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    float: Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)],
    str: str,
    bool: bool,
    type(None): None,
}
_Size = Annotated[int, Meta(ge=0)]
_Shape = Annotated[tuple[_Size, ...], Meta(max_length=codecs.MAX_DIMENSIONS)]


class _Table(msgspec.Struct):
    """What a header says of its tensors; msgspec keeps what it makes of a class, not of a tuple."""

    tensors: tuple[tuple[_Size, str, _Size, _Shape], ...]


@functools.cache
def _strict(hint: Any) -> Any:
    """Return *hint* with the bounds of the wire; a hint that may not travel is a TypeError."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        fields = [_strict_field(field, hints[field.name]) for field in dataclasses.fields(hint)]
        return msgspec.defstruct(hint.__name__, fields, kw_only=True)  # type: ignore[union-attr]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(*args)
    if origin is tuple and args[1:] == (...,):
        return tuple[_strict(args[0]), ...]  # type: ignore[misc]
    if origin is dict and args[0] is str:
        return dict[str, _strict(args[1])]  # type: ignore[misc]
    if origin in (types.UnionType, typing.Union) and args[1:] == (type(None),):
        return typing.Optional[_strict(args[0])]  # noqa: UP045 - it is computed
    raise TypeError(f"{hint!r} cannot travel in a header")


def _bounded(hint: Any, form: Matching | Between) -> Any:
    """Return *hint*, a text or an integer, with the form that it has on the wire."""
    if isinstance(form, Between):
        return Annotated[hint, Meta(ge=form.least, le=form.most)]
    return Annotated[hint, Meta(pattern=rf"\A(?:{form.pattern})\Z")]


def _strict_field(field: dataclasses.Field[Any], hint: Any) -> tuple[Any, ...]:
    """Return a field as `defstruct` takes it; where it has a default, it may be missing."""
    missing = dataclasses.MISSING
    if field.default is missing and field.default_factory is missing:
        return field.name, _strict(hint)
    return field.name, _strict(hint), None  # only the dataclass's own default is ever read


def _reason(error: Exception, where: str) -> str:
    """Say what msgspec refused, with *where* as the root of its path."""
    text = str(error) if "`$" in str(error) else f"{error} - at `$`"
    text = re.sub(r"`float` [<>]= -?1\.79\S*", "a finite number", text)  # the bounds of floats
    return text.replace("`$", f"`{where}")[:300]


def write_fields(value: Any) -> Plain:
    """Return dataclass *value* as plain maps, lists and scalars, each checked against its hint."""
    kind: Any = type(value)
    strict = _strict(kind)
    try:
        # Bytes would be written as base64; other people's floats, such as numpy's, become ours.
        plain = msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=float)
        msgspec.convert(plain, strict)
    except (TypeError, ValueError) as error:
        raise LocalProtocolError(_reason(error, kind.__name__)) from error
    return plain


# Who reads these has the key of the only peer that can send them, and settings as they are.
_TRUSTED = frozenset(FROM_COORDINATOR) - frozenset(FROM_DEVICE)


def _clean(value: Plain) -> Plain:
    """Return *value* with all texts in it as they may be shown and written down.

    What has a form has been checked before: no text becomes one that is allowed by being cleaned.
    """
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT and value.isprintable() else public_text(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return tuple(map(_clean, value)) if isinstance(value, tuple) else value


@functools.cache
def _has_free_text(hint: Any) -> bool:
    """Return whether a value of *hint* may hold a text without a form."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return any(_has_free_text(hints[field.name]) for field in dataclasses.fields(hint))
    if typing.get_origin(hint) is Annotated:
        return False
    return hint is str or any(map(_has_free_text, typing.get_args(hint)))


def read_fields(kind: type, value: Plain, where: str) -> Any:
    """Return the *kind* that the plain *value* stands for; a mistake in it is the peer's."""
    try:
        msgspec.convert(value, _strict(kind))
        is_clean = kind in _TRUSTED or not _has_free_text(kind)
        return msgspec.convert(value if is_clean else _clean(value), kind)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(_reason(error, where)) from error


def _version() -> str:
    """Return which protocol this side speaks, and of which release it is, for people."""
    from importlib import metadata  # imported here, as it loads all of `email`

    try:
        return f"{PROTOCOL_VERSION} (edgesplit {metadata.version('edgesplit')})"
    except metadata.PackageNotFoundError:
        return str(PROTOCOL_VERSION)


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
            f"protocol version {str(header['v'])[:20]}, this side speaks {_version()}; "
            "install the same version of edgesplit on both sides"
        )
    if not header.keys() >= {"type", "body", "tensors"}:
        raise RemoteProtocolError(f"header has the fields {str(sorted(map(repr, header)))[:200]}")
    kind = MESSAGES.get(header["type"]) if type(header["type"]) is str else None
    if kind is None:
        raise RemoteProtocolError(
            f"unknown message type {str(header['type'])[:60]!r}: none of version {_version()}; "
            "install the same version of edgesplit on both sides"
        )
    message = read_fields(kind, header["body"], kind.__name__)
    return message, _read_table(header["tensors"], kind.__name__)


@functools.lru_cache(32)
def _write_table(tensors: tuple[TensorSpec, ...]) -> Plain:
    """Return the table front-coded: a header holds thousands of long, similar names.

    It is the same for all devices with the same plan, which are told of a round one after another.
    """
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


def _read_table(table: Plain, kind: str) -> tuple[TensorSpec, ...]:
    try:
        rows = msgspec.convert({"tensors": table}, _Table).tensors
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(_reason(error, kind)) from error
    where = f"{kind}.tensors"
    specs: dict[str, TensorSpec] = {}
    last, names = "", tuple(codecs.CODECS)
    for shared, suffix, number, shape in rows:
        if shared > len(last):
            raise RemoteProtocolError(f"{where}: {shared} shared letters of {len(last)}")
        last = last[:shared] + suffix
        if last in specs or len(last) > MAX_TENSOR_NAME:
            raise RemoteProtocolError(f"{where}: the name {last[:60]!r} is not new and short")
        if number >= len(names):
            raise RemoteProtocolError(f"{where}: codec {number}, there are {len(names)}")
        specs[last] = TensorSpec(last, names[number], shape)
    return tuple(specs.values())
