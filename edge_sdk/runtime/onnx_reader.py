"""An ONNX model's bytes as plain tables, read strictly: only fields that our exporter writes.

A graph comes from the coordinator and is a program. It is looked at before any library sees it,
without `onnx`, which a device need not have. Protobuf gives a field that occurs twice, or that is
unknown, a meaning of its own in each reader; here it is refused. What a graph may do says
`onnx_rules.py`.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from edge_sdk.errors import ModelError

Table = dict[str, Any]
# What one model may hold: ours have 2,000 nodes at most, and ten times as many fields.
MAX_FIELDS = 1_000_000


class Field(NamedTuple):
    """What a field of a protobuf message holds."""

    name: str
    holds: str
    """`int`, `float`, `bytes`, `text`, or the name of a message in `MESSAGES`."""
    is_list: bool = False


# By number, of onnx.proto. Left out are, among others: tensors and graphs as attributes, tensors
# with external data, sparse tensors, functions, metadata, training information.
MESSAGES: dict[str, dict[int, Field]] = {
    "Model": {
        1: Field("ir_version", "int"),
        2: Field("producer", "text"),
        7: Field("graph", "Graph"),
        8: Field("opsets", "Opset", is_list=True),
    },
    "Opset": {1: Field("domain", "text"), 2: Field("version", "int")},
    "Graph": {
        1: Field("nodes", "Node", is_list=True),
        2: Field("name", "text"),
        5: Field("constants", "Tensor", is_list=True),
        11: Field("inputs", "Value", is_list=True),
        12: Field("outputs", "Value", is_list=True),
    },
    "Node": {
        1: Field("inputs", "text", is_list=True),
        2: Field("outputs", "text", is_list=True),
        3: Field("name", "text"),
        4: Field("op", "text"),
        5: Field("attributes", "Attribute", is_list=True),
    },
    "Attribute": {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "int"),
        4: Field("s", "bytes"),
        8: Field("ints", "int", is_list=True),
        20: Field("type", "int"),
    },
    "Tensor": {
        1: Field("dims", "int", is_list=True),
        2: Field("type", "int"),
        8: Field("name", "text"),
        9: Field("raw", "bytes"),
    },
    "Value": {1: Field("name", "text"), 2: Field("type", "Type")},
    "Type": {1: Field("tensor", "TensorType")},
    "TensorType": {1: Field("type", "int"), 2: Field("shape", "Shape")},
    "Shape": {1: Field("dims", "Dim", is_list=True)},
    "Dim": {1: Field("size", "int"), 2: Field("letter", "text")},
}
_VARINT, _BYTES, _FLOAT = 0, 2, 5


def read_model(data: bytes) -> Table:
    """Return an ONNX model as tables; fields that are missing are missing.

    Raises:
        ModelError: it holds something that our exporter never writes, or is damaged.
    """
    try:
        return _Reader(memoryview(data)).message("Model", 0, len(data))
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise ModelError("it is no ONNX model, or cut off") from error


class _Reader:
    """A walk over one model; messages in messages are as deep as `MESSAGES` has them."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._left = data, MAX_FIELDS

    def message(self, kind: str, at: int, end: int) -> Table:
        """Return the message between two places."""
        fields, found = MESSAGES[kind], Table()
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ModelError(f"it holds more than {MAX_FIELDS} fields")
            key, at = self._varint(at, end)
            field = fields.get(key >> 3)
            if field is None:
                raise ModelError(f"it holds field {key >> 3} of {kind}, which we never write")
            value, at = self._value(field, key & 7, at, end)
            if field.is_list:
                found.setdefault(field.name, []).append(value)
            elif field.name in found:
                raise ModelError(f"it holds {field.name} of {kind} twice")
            else:
                found[field.name] = value
        return found

    def _value(self, field: Field, wire: int, at: int, end: int) -> tuple[Any, int]:
        if field.holds == "int" and wire == _VARINT:
            number, at = self._varint(at, end)
            return number - (1 << 64) * (number >> 63), at
        if field.holds == "float" and wire == _FLOAT:
            return struct.unpack("<f", self._data[at : self._within(at + 4, end)])[0], at + 4
        if field.holds in ("int", "float") or wire != _BYTES:
            raise ModelError(f"its {field.name} is written as we never do")
        size, at = self._varint(at, end)
        stop = self._within(at + size, end)
        if field.holds in MESSAGES:
            return self.message(field.holds, at, stop), stop
        piece = self._data[at:stop]
        return (str(piece, "utf-8") if field.holds == "text" else piece), stop

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = 0
        for place in range(10):
            byte = self._data[self._within(at + 1, end) - 1]
            number |= (byte & 0x7F) << 7 * place
            at += 1
            if byte < 0x80:
                return number & (1 << 64) - 1, at
        raise ModelError("it is no ONNX model: a number has no end")

    def _within(self, at: int, end: int) -> int:
        if at > end:
            raise ModelError("it is no ONNX model, or cut off")
        return at
