"""What a graph of the coordinator may be: our exporter's operators, in our form, on plain tensors.

No graph inside another, no function, no other domain, no data in other files, and nothing that
waits, repeats, draws or reads. `coordinator/onnx_export` writes nothing else, which a test
compares. How large its tensors become says `onnx_sizes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edge_sdk.errors import ModelError
from edge_sdk.runtime.onnx_reader import Table, read_model

# AttributeProto.FLOAT, INT, STRING and INTS, and the field in which each lies.
FLOAT, INT, STRING, INTS = 1, 2, 3, 7
_FIELDS = {FLOAT: "f", INT: "i", STRING: "s", INTS: "ints"}
_AXIS, _KEEPS = {"axis": INT}, {"keepdims": INT}
# Every operator that the exporter writes, with its attributes.
OPERATORS: dict[str, Mapping[str, int]] = {
    **dict.fromkeys(
        ("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
        + ("Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Where")
        + ("Abs", "Cos", "Erf", "Exp", "Identity", "Log", "Neg", "Not", "Reciprocal", "Relu")
        + ("Sigmoid", "Sin", "Sqrt", "Tanh", "CumSum", "MatMul", "Expand", "GatherND", "Pad")
        + ("Range", "Reshape", "Slice", "Squeeze", "Tile", "Unsqueeze"),
        {},
    ),
    **dict.fromkeys(("Concat", "Gather", "GatherElements", "Split"), _AXIS),
    **dict.fromkeys(("LogSoftmax", "Softmax"), _AXIS),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _KEEPS),
    "ArgMax": {**_AXIS, **_KEEPS},
    "Cast": {"to": INT},
    "Gemm": {"transA": INT, "transB": INT},
    "LayerNormalization": {**_AXIS, "epsilon": FLOAT},
    "ScatterElements": {**_AXIS, "reduction": STRING},
    "ScatterND": {"reduction": STRING},
    "Shape": {"start": INT, "end": INT},
    "Transpose": {"perm": INTS},
}
OPSET, PRODUCER = 18, "edgesplit"
# Bytes of a number, by TensorProto's types: floats, integers and truth values.
ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}


class RefusedGraph(ModelError):
    """A graph of the coordinator is not run here; the coordinator is told why."""

    is_public = True


def checked_model(data: bytes) -> Table:
    """Return a graph as tables, once it is known to be what our exporter writes.

    Raises:
        ModelError: it is not; the message says what is wrong.
    """
    model = read_model(data)
    _check_model(model)
    return model


def _check_model(model: Table) -> None:
    opsets = [(opset.get("domain", ""), opset.get("version")) for opset in model.get("opsets", ())]
    if opsets != [("", OPSET)] or model.get("producer") != PRODUCER:
        raise ModelError("its operators are not those of one version of ONNX alone")
    graph = model.get("graph", {})
    known = set[str]()
    for value in graph.get("inputs", ()):
        _declare(value.get("name", ""), known)
        _check_input(value)
    for tensor in graph.get("constants", ()):
        _declare(tensor.get("name", ""), known)
        _check_constant(tensor)
    for node in graph.get("nodes", ()):
        _check_node(node, known)
    if not {value.get("name") for value in graph.get("outputs", ())} <= known:
        raise ModelError("it gives what nothing in it computes")


def _declare(name: str, known: set[str]) -> None:
    if not name or name in known:
        raise ModelError("a value has no name, or that of another one")
    known.add(name)


def _check_input(value: Table) -> None:
    tensor = value.get("type", {}).get("tensor", {})
    if tensor.get("type") not in ELEMENT_BYTES or "shape" not in tensor:
        raise ModelError("an input is no tensor of numbers")
    if any(dim.get("size", 0) < 0 for dim in tensor["shape"].get("dims", ())):
        raise ModelError("an input has a size below 0")


def _check_constant(tensor: Table) -> None:
    """Refuse a constant whose bytes are not all here: they would come from another place."""
    dims, size = tensor.get("dims", []), ELEMENT_BYTES.get(tensor.get("type", 0))
    if size is None or min(dims, default=0) < 0:
        raise ModelError("a constant is no tensor of numbers")
    if math.prod(dims) * size != len(tensor.get("raw", b"")):
        raise ModelError("a constant's bytes are not in it, or not as many as its shape takes")


def _check_node(node: Table, known: set[str]) -> None:
    op = node.get("op", "")
    allowed = OPERATORS.get(op)
    if allowed is None:
        raise ModelError(f"it uses the operator {op[:40]!r}, which we never write")
    if not set(node.get("inputs", ())) <= known:
        raise ModelError(f"{op} is given what nothing before it computes")
    given = [attribute.get("name", "") for attribute in node.get("attributes", ())]
    if len(set(given)) != len(given):
        raise ModelError(f"{op} has an attribute twice")
    for attribute in node.get("attributes", ()):
        kind = allowed.get(attribute.get("name", ""))
        fields = attribute.keys() - {"name", "type"}
        # An empty list is no field at all, and zero may be left out.
        if kind is None or attribute.get("type") != kind or not fields <= {_FIELDS[kind]}:
            raise ModelError(f"{op} has an attribute that we never write")
    for name in node.get("outputs", ()):
        _declare(name, known)
