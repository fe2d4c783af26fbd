"""Write a traced graph as an ONNX model: names, constants, sizes that are symbols.

What each operator becomes stands in `operators.py`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from coordinator.onnx_export.trace import Traced
from edge_sdk.errors import ModelError

# LayerNormalization, and reductions with axes as inputs; onnxruntime 1.17 and later read both.
OPSET, IR_VERSION = 18, 8
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
NUMPY_TYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
Value = str | list[str]
Lowering = Callable[["Writer", fx.Node], Value]


class Writer:
    """Collects the nodes and constants of one model."""

    def __init__(self, traced: Traced, lowerings: dict[str, Lowering]) -> None:
        self._traced, self._lowerings = traced, lowerings
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._initializers: list[TensorProto] = []
        self._values: dict[fx.Node, Value] = {}
        self._sizes: dict[Any, str] = {}
        self._sources: dict[Any, tuple[str, int]] = {}
        self._letters: dict[Any, str] = {}

    # ---- the model ----

    def write(self) -> bytes:
        """Return the model, serialised; the same trace gives the same bytes.

        Raises:
            ModelError: an operator has no translation.
        """
        graph = self._traced.graph
        names = iter(self._traced.inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self._place(node, next(names))
            elif node.op == "get_attr":
                self._values[node] = self.constant(getattr(graph, str(node.target)))
            elif node.op == "call_function":
                self._lower(node)
        outputs: Any = graph.graph.output_node().args[0]
        return self._model(list(outputs))

    def _place(self, node: fx.Node, name: str) -> None:
        self._values[node] = name
        letters = self._traced.inputs[name].shape
        for axis, (letter, size) in enumerate(zip(letters, node.meta["val"].shape, strict=True)):
            if isinstance(letter, str):
                self._letters[size.node.expr] = letter
            if isinstance(letter, str) and letter != "R":
                self._sources.setdefault(size.node.expr, (name, axis))

    def _lower(self, node: fx.Node) -> None:
        # Sizes are written from their formulas, where they are used.
        if isinstance(node.meta.get("val"), torch.SymInt | int):
            return
        name = _name(node)
        if name not in self._lowerings:
            raise ModelError(f"onnxruntime: no translation of the model's operator {name!r}")
        self._values[node] = self._lowerings[name](self, node)

    def _model(self, outputs: list[fx.Node]) -> bytes:
        for node, name in zip(outputs, self._traced.outputs, strict=True):
            self._nodes.append(helper.make_node("Identity", [self.value(node)], [name]))
        placeholders = self._traced.graph.graph.find_nodes(op="placeholder")
        used = {name for node in self._nodes for name in node.input}
        inputs = [
            self._info(name, node)
            for name, node in zip(self._traced.inputs, placeholders, strict=True)
            if name in used
        ]
        results = [
            self._info(name, node) for name, node in zip(self._traced.outputs, outputs, strict=True)
        ]
        graph = helper.make_graph(self._nodes, "slice", inputs, results, self._initializers)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="edgesplit")
        model.ir_version = IR_VERSION
        return bytes(model.SerializeToString(deterministic=True))

    def _info(self, name: str, node: fx.Node) -> onnx.ValueInfoProto:
        value = node.meta["val"]
        shape = [self._shown(_expression(size)) for size in value.shape]
        return helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], shape)

    def _shown(self, expression: Any) -> int | str | None:
        """Return a size as the model shows it: ranks without a name, as they may differ."""
        if expression.is_number:
            return int(expression)
        letter = self._letters.get(expression)
        return None if letter == "R" else letter

    # ---- what lowerings use ----

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.add_many(op, inputs, 1, **attributes)[0]

    def add_many(
        self, op: str, inputs: Sequence[str], num_outputs: int, **attributes: Any
    ) -> list[str]:
        """Append a node and return the names of its outputs."""
        outputs = [f"v{len(self._nodes)}_{i}" for i in range(num_outputs)]
        # Named, because some releases of onnxruntime fuse nodes and name the result after them.
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def value(self, node: Any) -> str:
        """Return the name of the tensor that *node* gives."""
        name = self._values[node]
        assert isinstance(name, str), f"{node} has several outputs"
        return name

    def values(self, node: Any) -> list[str]:
        """Return the names of all that *node* gives."""
        names = self._values[node]
        return [names] if isinstance(names, str) else names

    def operand(self, argument: Any, dtype: torch.dtype) -> str:
        """Return a tensor, a size or a number as a tensor of *dtype*."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            is_same = argument.meta["val"].dtype == dtype
            name = self.value(argument)
            return name if is_same else self.cast(name, dtype)
        if isinstance(argument, fx.Node):
            scalar = self.add("Squeeze", self.size(argument))
            return scalar if dtype == torch.int64 else self.cast(scalar, dtype)
        return self.constant(np.array(argument, NUMPY_TYPES[dtype]))

    def cast(self, name: str, dtype: torch.dtype) -> str:
        """Return *name* in another dtype."""
        return self.add("Cast", name, to=ONNX_TYPES[dtype])

    def constant(self, value: Any) -> str:
        """Return a constant tensor; equal ones are written once."""
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def ints(self, *numbers: int) -> str:
        """Return a vector of int64."""
        return self.constant(np.array(numbers, np.int64))

    # ---- sizes ----

    def shape(self, sizes: Sequence[Any]) -> str:
        """Return the vector of *sizes*: numbers, symbols, or nodes that give them."""
        known = [_expression(size) for size in sizes]
        if all(expression.is_number for expression in known):
            return self.ints(*map(int, known))
        return self.add("Concat", *(self._size(expression) for expression in known), axis=0)

    def size(self, size: Any) -> str:
        """Return one size as a vector of length one."""
        return self._size(_expression(size))

    def _size(self, expression: Any) -> str:
        if expression.is_number:
            return self.ints(int(expression))
        if expression not in self._sizes:
            self._sizes[expression] = self._compute(expression)
        return self._sizes[expression]

    def _compute(self, expression: Any) -> str:
        if expression in self._sources:
            name, axis = self._sources[expression]
            return self.add("Shape", name, start=axis, end=axis + 1)
        operators = {
            sympy.Add: "Add",
            sympy.Mul: "Mul",
            sympy.Max: "Max",
            sympy.Min: "Min",
            FloorDiv: "Div",  # sizes are never negative
            Mod: "Mod",
            PythonMod: "Mod",
        }
        operator = operators.get(expression.func)
        if operator is None:  # a rank, among others: it stands for many
            raise ModelError(f"onnxruntime: no translation of the size {expression}")
        name, *rest = (self._size(argument) for argument in expression.args)
        for other in rest:
            name = self.add(operator, name, other)
        return name


def _name(node: fx.Node) -> str:
    """Return `view.default` and the like of aten, or the function's own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.")
    return str(getattr(target, "__name__", target))


def _expression(size: Any) -> Any:
    """Return a size as a formula."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
