"""How large the tensors of a graph become at most, found before it is loaded.

Sizes are followed from the inputs through every node as bounds: least and most of each number that
makes a size, most of each dimension. A graph whose sizes cannot be followed is refused, as is one
of which the tensors that are there at the same time need more than this machine may give.

Legend: B sequences, T positions, N targets, R rank.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from edge_sdk.errors import ModelError
from edge_sdk.runtime.onnx_reader import Table
from edge_sdk.runtime.onnx_rules import ELEMENT_BYTES, RefusedGraph, checked_model

Span = tuple[float, float]
"""Least and most of a number."""
# Numbers that may make a size: more of them than a tensor has dimensions, twice for padding.
MOST_KNOWN = 64
MOST_DIMS = 16
MOST_SIZE = 1 << 40
_INT64, _BOOL = 7, 9
_FLOATS = (1, 10, 11, 16)
_FORMATS = {1: "f", 6: "i", 7: "q", 11: "d"}
_OURS: dict[str, list[tuple[object, ...]]] = {
    "input_ids": [("B", "T")],
    "lengths": [("B",), (1,)],
    "hidden": [("B", "T", 0), (1, "N", 0)],
    "grad": [("B", "T", 0)],
    "labels": [("N",), ("B",)],
}
"""Inputs whose sizes we choose: letters as the exporter has them, 0 for the model's own sizes."""


class Sizes(NamedTuple):
    """What the sizes that vary are at most."""

    B: int
    T: int
    N: int
    R: int


class Value(NamedTuple):
    """What is known of a tensor."""

    dims: tuple[int, ...]
    """Most of each dimension."""
    type: int
    known: tuple[Span, ...] | None = None
    """Bounds of each of its numbers; None where they are not followed."""
    holds: int = -1
    """Most numbers in all, where that is less than the dimensions allow; -1: it is not."""
    columns: int = 0
    """Size of its last dimension, where that is no bound but known; else 0."""

    @property
    def num(self) -> int:
        """Most numbers that it holds."""
        return math.prod(self.dims) if self.holds < 0 else self.holds

    @property
    def num_bytes(self) -> int:
        """Most bytes that it takes."""
        return self.num * ELEMENT_BYTES[self.type]


def check_room(models: Mapping[str, bytes], sizes: Sizes, have_bytes: float) -> None:
    """Refuse graphs that need more memory than there is, before any of them is loaded.

    Raises:
        ModelError: sizes cannot be followed through a graph.
        MemoryError: its tensors would take more than twice *have_bytes* at the same time. Operators
            that write where they read need up to half of what is counted.
    """
    for name, data in models.items():
        try:
            most = most_bytes(checked_model(data), sizes)
        except ModelError as error:
            raise RefusedGraph(f"graph {name!r} is refused: {error}") from None
        if most > 2 * have_bytes:
            raise MemoryError(
                f"graph {name!r} would take {most / 1e9:.3g} GB for {sizes.B} sequences of "
                f"{sizes.T} tokens; this device has {have_bytes / 1e9:.3g} GB"
            )


def most_bytes(model: Table, sizes: Sizes) -> int:
    """Return the most bytes of tensors that are there at the same time while *model* runs.

    Weights and constants are not counted, nor is that many operators write where they read.

    Raises:
        ModelError: a size is computed from what is not known before.
    """
    graph = model["graph"]
    # What is computed of constants alone becomes one when the graph is loaded, and stays.
    lasting = {entry["name"] for entry in graph.get("constants", ())}
    values = {entry["name"]: _given(entry, sizes) for entry in graph.get("inputs", ())}
    values |= {entry["name"]: _constant(entry) for entry in graph.get("constants", ())}
    nodes = graph.get("nodes", ())
    last = {name: at for at, node in enumerate(nodes) for name in node.get("inputs", ())}
    last |= dict.fromkeys((entry["name"] for entry in graph.get("outputs", ())), len(nodes))
    there: dict[str, int] = {}
    now = most = 0
    for at, node in enumerate(nodes):
        given, names = node.get("inputs", ()), node.get("outputs", ())
        made = _follow(node, [values[name] for name in given])
        values |= dict(zip(names, made, strict=True))
        now += sum(value.num_bytes for value in made)
        most = max(most, now)
        if lasting.issuperset(given):
            lasting.update(names)
        there |= {name: values[name].num_bytes for name in names if name not in lasting}
        now -= sum(there.pop(name, 0) for name in (*given, *names) if last.get(name, at) == at)
    return most


def _given(entry: Table, sizes: Sizes) -> Value:
    """Return what is known of an input: its sizes are the model's, or those that we choose."""
    name, tensor = entry["name"], entry["type"]["tensor"]
    shape = [dim.get("letter", dim.get("size")) for dim in tensor["shape"].get("dims", ())]
    if name in _OURS:
        ours = [0 if isinstance(size, int) and at > 1 else size for at, size in enumerate(shape)]
        if tuple(ours) not in _OURS[name]:
            raise ModelError(f"its input {name!r} has another shape than we give it")
        most = [getattr(sizes, size) if isinstance(size, str) else size for size in shape]
        return Value(tuple(most), tensor["type"])
    own = [size for size in shape if isinstance(size, int)]
    free = shape.count(None)
    is_factor = free == 1 == len(own) and name.endswith((".A", ".B", ".U", ".V"))
    if len(own) + free < len(shape) or (free and not is_factor):
        raise ModelError(f"its input {name[:80]!r} has a size that is not the model's")
    rank = min(sizes.R, max(own, default=0)) if name.endswith((".A", ".B")) else max(own, default=0)
    return Value(tuple(rank if size is None else size for size in shape), tensor["type"])


def _constant(tensor: Table) -> Value:
    dims, kind = tuple(tensor.get("dims", ())), tensor["type"]
    count = math.prod(dims)
    if kind not in _FORMATS or count > MOST_KNOWN:
        return Value(dims, kind)
    numbers = struct.unpack(f"<{count}{_FORMATS[kind]}", tensor.get("raw", b""))
    return Value(dims, kind, tuple((number, number) for number in numbers))


# ---- nodes ----

Inputs = Sequence[Value]
About = Mapping[str, Any]
"""A node's attributes."""
Rule = Callable[[Inputs, About], Value]


def _follow(node: Table, given: Inputs) -> list[Value]:
    """Return what is known of a node's outputs."""
    op, num = node["op"], len(node.get("outputs", ()))
    about = {a["name"]: a.get("i", a.get("ints", 0)) for a in node.get("attributes", ())}
    if op == "Shape" and node["inputs"][0] not in _OURS:
        raise ModelError("it asks for the shape of what is not given to it")
    try:
        made = _RULES[op](given, about)
        if len(made.dims) > MOST_DIMS or min(made.dims, default=0) < 0:
            raise ModelError(f"{op} gives a tensor of a shape that we never write")
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{op} is given what we never give it") from error
    if num != 1 and op not in ("Split", "LayerNormalization"):
        raise ModelError(f"{op} has {num} outputs")
    return [made] * num


def _numbers(value: Value) -> tuple[Span, ...]:
    """Return the bounds of numbers that make a size."""
    if value.known is None:
        raise ModelError("a size is computed from what is not known before it runs")
    return value.known


def _integers(value: Value) -> list[int]:
    """Return numbers that are the same whatever the sizes are."""
    if any(least != most for least, most in _numbers(value)):
        raise ModelError("an axis depends on a size")
    return [int(most) for _, most in _numbers(value)]


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(map(max, zip(*padded, strict=True)))


def _all(given: Inputs, _: object) -> Value:
    """Element by element, of operands of all shapes that fit."""
    widest = max((value.type for value in given), key=ELEMENT_BYTES.__getitem__)
    return Value(_broadcast(*(value.dims for value in given)), widest)


def _truth(given: Inputs, about: About) -> Value:
    return _all(given, about)._replace(type=_BOOL)


def _same(given: Inputs, _: object) -> Value:
    return given[0]._replace(known=None, columns=0)


def _arithmetic(compute: Callable[[float, float], float], is_division: bool = False) -> Rule:
    """Follow numbers through an operator that is monotone in each operand, or nearly so."""

    def rule(given: Inputs, about: About) -> Value:
        made, (left, *rest) = _all(given, about), given
        right = rest[0]
        one, other = left.known, right.known
        if is_division and made.type not in _FLOATS:
            if min(least for least, _ in _numbers(right)) < 1:
                raise ModelError("an integer is divided by what may be zero")
        elif is_division:
            other = None
        if one is None or other is None or len(rest) > 1 or len(made.dims) > 1:
            return made
        size = max(len(one), len(other))
        if {len(one), len(other)} - {1, size}:
            return made
        one, other = one * (size // len(one)), other * (size // len(other))
        corners = [[compute(a, b) for a in x for b in y] for x, y in zip(one, other, strict=True)]
        lowest = [min(found) for found in corners]
        if is_division:  # a remainder is none of the corners
            lowest = [min(0.0, low) for low in lowest]
        spans = zip(lowest, map(max, corners), strict=True)
        return made._replace(known=_sane(spans))

    return rule


def _sane(spans: Iterable[Span]) -> tuple[Span, ...] | None:
    """Return bounds; None where they lie beyond what a size can be, or a number can hold."""
    found = tuple(spans)
    return found if all(-MOST_SIZE <= a <= b <= MOST_SIZE for a, b in found) else None


def _rest(_: float, divisor: float) -> float:
    return divisor - 1


def _quotient(dividend: float, divisor: float) -> float:
    return math.trunc(dividend / divisor)


def _cast(given: Inputs, about: About) -> Value:
    if about["to"] not in ELEMENT_BYTES:
        raise ModelError("it casts to what is no number")
    value, known = given[0], given[0].known
    if known is not None:  # other types would wrap
        spans = ((math.floor(least), math.ceil(most)) for least, most in known)
        known = _sane(spans) if about["to"] in (1, _INT64) else None
    return value._replace(type=about["to"], known=known)


def _matmul(given: Inputs, _: object) -> Value:
    left, right = (value.dims for value in given)
    outer = _broadcast(left[:-2], right[:-2])
    return Value((*outer, left[-2], right[-1]), given[0].type)


def _gemm(given: Inputs, about: About) -> Value:
    (first, second), (third, fourth) = given[0].dims, given[1].dims
    rows = second if about.get("transA") else first
    return Value((rows, third if about.get("transB") else fourth), given[0].type)


def _over(value: Value, axes: Sequence[int], *, keeps: bool) -> tuple[int, ...]:
    gone = {axis % len(value.dims) for axis in axes}
    shape = ((at, 1 if at in gone else size) for at, size in enumerate(value.dims))
    return tuple(size for at, size in shape if keeps or at not in gone)


def _reduce(given: Inputs, about: About) -> Value:
    value = given[0]
    axes = (_integers(given[1]) if len(given) > 1 else []) or range(len(value.dims))
    return Value(_over(value, list(axes), keeps=bool(about.get("keepdims", 1))), value.type)


def _argmax(given: Inputs, about: About) -> Value:
    keeps = bool(about.get("keepdims", 1))
    return Value(_over(given[0], [about.get("axis", 0)], keeps=keeps), _INT64)


def _shape(given: Inputs, about: About) -> Value:
    dims = given[0].dims[about.get("start", 0) : about.get("end", len(given[0].dims))]
    return Value((len(dims),), _INT64, tuple((1, size) for size in dims))


def _concat(given: Inputs, about: About) -> Value:
    axis = about["axis"] % len(given[0].dims)
    dims = list(_broadcast(*(value.dims for value in given)))
    dims[axis] = sum(value.dims[axis] for value in given)
    known = None
    if len(dims) == 1 and dims[0] <= MOST_KNOWN and all(value.known for value in given):
        known = tuple(span for value in given for span in value.known or ())
    is_last = axis == len(dims) - 1 and all(value.columns for value in given)
    columns = sum(value.columns for value in given) if is_last else 0
    return Value(tuple(dims), given[0].type, known, columns=columns)


def _unsqueeze(given: Inputs, _: object) -> Value:
    value, where = given
    dims, axes = list(value.dims), _integers(where)
    rank = len(dims) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        dims.insert(axis, 1)
    return value._replace(dims=tuple(dims), columns=int(axes == [-1]))


def _squeeze(given: Inputs, _: object) -> Value:
    dims = given[0].dims
    gone = (
        _integers(given[1]) if len(given) > 1 else [i for i, size in enumerate(dims) if size == 1]
    )
    return given[0]._replace(dims=_over(given[0], gone, keeps=False), columns=0)


def _gather(given: Inputs, about: About) -> Value:
    value, picked = given
    axis = about.get("axis", 0) % len(value.dims)
    dims = (*value.dims[:axis], *picked.dims, *value.dims[axis + 1 :])
    return Value(dims, value.type)


def _gather_nd(given: Inputs, _: object) -> Value:
    value, places = given
    if places.columns != places.dims[-1]:
        raise ModelError("places have a number of coordinates that may change")
    return Value((*places.dims[:-1], *value.dims[places.dims[-1] :]), value.type)


def _transpose(given: Inputs, about: About) -> Value:
    value, order = given[0], about["perm"]
    if sorted(order) != list(range(len(value.dims))):
        raise ModelError("Transpose has no order of its dimensions")
    return value._replace(dims=tuple(value.dims[axis] for axis in order), known=None, columns=0)


def _reshape(given: Inputs, _: object) -> Value:
    value, wanted = given
    asked = _numbers(wanted)
    if any(least < 0 and (least, most) != (-1, -1) for least, most in asked):
        raise ModelError("a size may be below 0")
    # Zero stands for the size that is there, -1 for what is left.
    dims = [
        max(most, value.dims[at]) if not least else most for at, (least, most) in enumerate(asked)
    ]
    others = math.prod(max(1, int(least)) for least, _ in asked)
    whole = [value.num // others if size == -1 else int(size) for size in dims]
    # However it is shaped, it holds as many numbers as before.
    return Value(tuple(min(size, value.num) for size in whole), value.type, value.known, value.num)


def _expand(given: Inputs, _: object) -> Value:
    value, wanted = given
    shape = tuple(int(most) for _, most in _numbers(wanted))
    return Value(_broadcast(value.dims, shape), value.type)


def _tile(given: Inputs, _: object) -> Value:
    value, wanted = given
    times = (int(most) for _, most in _numbers(wanted))
    return Value(tuple(size * n for size, n in zip(value.dims, times, strict=True)), value.type)


def _range(given: Inputs, _: object) -> Value:
    (start, *_), (stop, *_), (step, *_) = map(_numbers, given)
    if step[0] <= 0:
        raise ModelError("numbers in a row go backwards, or nowhere")
    return Value((max(0, math.ceil((stop[1] - start[0]) / step[0])),), given[0].type)


def _pad(given: Inputs, _: object) -> Value:
    value, wanted = given
    pads, rank = _numbers(wanted), len(value.dims)
    ends = zip(value.dims, pads[:rank], pads[rank:], strict=True)
    dims = (size + int(max(0, before) + max(0, after)) for size, (_, before), (_, after) in ends)
    return Value(tuple(dims), value.type)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("And", "Or", "Pow", "Where"), _all),
    **dict.fromkeys(
        ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        _truth,
    ),
    **dict.fromkeys(
        ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Not", "Reciprocal", "Relu", "Sigmoid", "Sin")
        + ("Sqrt", "Tanh", "Softmax", "LogSoftmax", "CumSum", "ScatterElements", "ScatterND")
        + ("Slice", "Split"),
        _same,
    ),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Max": _arithmetic(max),
    "Min": _arithmetic(min),
    "Div": _arithmetic(_quotient, is_division=True),
    "Mod": _arithmetic(_rest, is_division=True),
    "ArgMax": _argmax,
    "Cast": _cast,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": lambda given, _: Value(given[1].dims, given[0].type),
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": lambda given, _: given[0],
    "LayerNormalization": _same,
    "MatMul": _matmul,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
