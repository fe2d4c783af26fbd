"""What each aten operator of a traced slice becomes in ONNX.

The table holds what the model families of the tests use, forwards and backwards; an operator that
is missing is an error with its name. Operators of equal meaning share a line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from coordinator.onnx_writer import NUMPY_TYPES, Lowering, Value, Writer

LAST = 2**63 - 1
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Enter a function into the table under *names*."""

    def enter(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return enter


def out(node: fx.Node) -> torch.Tensor:
    """The tensor that *node* gives, without its data."""
    value = node.meta["val"]
    tensor: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return tensor


def arg(node: fx.Node, index: int, default: Any = None) -> Any:
    """A positional argument, or what stands for it."""
    return node.args[index] if index < len(node.args) else default


def axes(node: fx.Node, index: int) -> list[int]:
    """The dimensions that an argument names, none of them negative; all if it names none."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    given = arg(node, index)
    given = [given] if isinstance(given, int) else given or range(rank)
    return [axis % rank for axis in given] if rank else []


# ---- element by element ----

ELEMENTWISE = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "bitwise_and": "And",
    "logical_and": "And",
    "bitwise_or": "Or",
    "logical_or": "Or",
    "maximum": "Max",
    "minimum": "Min",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "eq": "Equal",
}


@lowers(*(f"{name}.{kind}" for name in ELEMENTWISE for kind in ("Tensor", "Scalar", "default")))
def binary(w: Writer, node: fx.Node) -> Value:
    """Two operands of one dtype."""
    left, right = node.args[:2]
    dtype = out(node).dtype
    if dtype == torch.bool:
        dtype = torch.result_type(*map(_stand_in, (left, right)))
    first, second = w.operand(left, dtype), w.operand(right, dtype)
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        second = w.add("Mul", second, w.operand(alpha, dtype))
    return w.add(ELEMENTWISE[str(node.target).split(".")[1]], first, second)


def _stand_in(argument: Any) -> Any:
    """What decides the dtype of a comparison."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return value if isinstance(value, torch.Tensor | int | float | bool) else 0


@lowers("ne.Tensor", "ne.Scalar")
def not_equal(w: Writer, node: fx.Node) -> Value:
    """Not equal."""
    dtype = torch.result_type(*map(_stand_in, node.args[:2]))
    same = w.add("Equal", w.operand(node.args[0], dtype), w.operand(node.args[1], dtype))
    return w.add("Not", same)


@lowers("rsub.Scalar", "rsub.Tensor")
def reversed_sub(w: Writer, node: fx.Node) -> Value:
    """The second operand less the first."""
    dtype = out(node).dtype
    return w.add("Sub", w.operand(node.args[1], dtype), w.operand(node.args[0], dtype))


UNARY = {
    "abs": "Abs",
    "bitwise_not": "Not",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "logical_not": "Not",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}


@lowers(*(f"{name}.default" for name in UNARY))
def unary(w: Writer, node: fx.Node) -> Value:
    """One operand."""
    return w.add(UNARY[str(node.target).split(".")[1]], w.operand(node.args[0], out(node).dtype))


@lowers("alias.default", "clone.default", "detach.default", "lift_fresh_copy.default")
def same(w: Writer, node: fx.Node) -> Value:
    """Nothing to do."""
    return w.value(node.args[0])


@lowers("rsqrt.default")
def rsqrt(w: Writer, node: fx.Node) -> Value:
    """One over the root."""
    return w.add("Reciprocal", w.add("Sqrt", w.value(node.args[0])))


@lowers("silu.default")
def silu(w: Writer, node: fx.Node) -> Value:
    """The input times its sigmoid."""
    x = w.value(node.args[0])
    return w.add("Mul", x, w.add("Sigmoid", x))


@lowers("gelu.default")
def gelu(w: Writer, node: fx.Node) -> Value:
    """X times the normal distribution's share below x, or its approximation by tanh."""
    x, dtype = w.value(node.args[0]), out(node).dtype

    def number(value: float) -> str:
        return w.operand(value, dtype)

    if node.kwargs.get("approximate", "none") == "tanh":
        cube = w.add("Mul", w.add("Mul", x, x), x)
        inner = w.add("Add", x, w.add("Mul", cube, number(0.044715)))
        bell = w.add("Tanh", w.add("Mul", inner, number((2 / np.pi) ** 0.5)))
    else:
        bell = w.add("Erf", w.add("Mul", x, number(0.5**0.5)))
    return w.add("Mul", w.add("Mul", x, number(0.5)), w.add("Add", bell, number(1.0)))


@lowers("pow.Tensor_Scalar")
def power(w: Writer, node: fx.Node) -> Value:
    """A fixed power; the small ones by multiplication, as Pow is slow."""
    x, exponent = w.operand(node.args[0], out(node).dtype), node.args[1]
    if exponent in (2, 3):
        square = w.add("Mul", x, x)
        return square if exponent == 2 else w.add("Mul", square, x)
    if exponent == 0.5:
        return w.add("Sqrt", x)
    return w.add("Pow", x, w.operand(exponent, out(node).dtype))


@lowers("_to_copy.default")
def to_copy(w: Writer, node: fx.Node) -> Value:
    """A change of dtype."""
    return w.operand(node.args[0], out(node).dtype)


@lowers("where.self", "where.ScalarSelf", "where.ScalarOther")
def where(w: Writer, node: fx.Node) -> Value:
    """A choice."""
    condition, yes, no = node.args
    dtype = out(node).dtype
    return w.add("Where", w.value(condition), w.operand(yes, dtype), w.operand(no, dtype))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(w: Writer, node: fx.Node) -> Value:
    """A number where the mask is true."""
    x, mask, number = node.args
    dtype = out(node).dtype
    return w.add("Where", w.value(mask), w.operand(number, dtype), w.value(x))


@lowers("threshold_backward.default")
def threshold_backward(w: Writer, node: fx.Node) -> Value:
    """The gradient where the input was above the threshold."""
    grad, x, threshold = node.args
    dtype = out(node).dtype
    is_below = w.add("LessOrEqual", w.value(x), w.operand(threshold, dtype))
    return w.add("Where", is_below, w.operand(0.0, dtype), w.value(grad))


# ---- products, norms and sums ----


@lowers("mm.default", "addmm.default")
def mm(w: Writer, node: fx.Node) -> Value:
    """A product of two matrices, perhaps on top of a third; transposes are free."""
    *third, left, right = node.args
    (a, is_a), (b, is_b) = _untransposed(left), _untransposed(right)
    terms = [w.value(a), w.value(b), *(w.value(c) for c in third)]
    return w.add("Gemm", *terms, transA=is_a, transB=is_b)


def _untransposed(node: Any) -> tuple[Any, int]:
    """The matrix under a transpose, and whether there was one."""
    if str(node.target) in ("aten.transpose.int", "aten.t.default"):
        return node.args[0], 1
    return node, 0


@lowers("bmm.default")
def bmm(w: Writer, node: fx.Node) -> Value:
    """Products of matrices."""
    return w.add("MatMul", *(w.value(a) for a in node.args))


@lowers("native_layer_norm.default")
def layer_norm(w: Writer, node: fx.Node) -> Value:
    """Output, mean and one over the deviation."""
    x, weight, bias, epsilon = node.args[0], *node.args[2:]
    shape: Any = node.args[1]
    ones: Any = np.ones(shape, NUMPY_TYPES[out(node).dtype])
    inputs = [w.value(x), w.constant(ones) if weight is None else w.value(weight)]
    inputs += [] if bias is None else [w.value(bias)]
    axis = -len(shape)
    return w.add_many("LayerNormalization", inputs, 3, axis=axis, epsilon=epsilon)


@lowers("_softmax.default", "_log_softmax.default")
def softmax(w: Writer, node: fx.Node) -> Value:
    """Softmax, or its logarithm."""
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return w.add(kind, w.operand(node.args[0], out(node).dtype), axis=node.args[1])


@lowers("_safe_softmax.default")
def safe_softmax(w: Writer, node: fx.Node) -> Value:
    """Softmax in which a row that is masked throughout is zero, not NaN."""
    x, axis = w.value(node.args[0]), arg(node, 1)
    dtype = out(node).dtype
    highest = w.add("ReduceMax", x, w.ints(axis), keepdims=1)
    is_dead = w.add("Equal", highest, w.operand(float("-inf"), dtype))
    return w.add("Where", is_dead, w.operand(0.0, dtype), w.add("Softmax", x, axis=axis))


REDUCTIONS = {
    "sum.dim_IntList": "ReduceSum",
    "sum.default": "ReduceSum",
    "mean.dim": "ReduceMean",
    "amax.default": "ReduceMax",
    "amin.default": "ReduceMin",
}


@lowers(*REDUCTIONS)
def reduction(w: Writer, node: fx.Node) -> Value:
    """Sums and the like over some dimensions."""
    x = w.operand(node.args[0], out(node).dtype)
    over = axes(node, 1)
    kind = REDUCTIONS[str(node.target).removeprefix("aten.")]
    return w.add(kind, x, w.ints(*over), keepdims=int(arg(node, 2, default=False)))


@lowers("cumsum.default")
def cumsum(w: Writer, node: fx.Node) -> Value:
    """Running sums."""
    axis = w.constant(np.array(node.args[1], np.int64))
    return w.add("CumSum", w.operand(node.args[0], out(node).dtype), axis)


@lowers("argmax.default")
def argmax(w: Writer, node: fx.Node) -> Value:
    """Where the largest value stands."""
    keeps = int(arg(node, 2, default=False))
    return w.add("ArgMax", w.value(node.args[0]), axis=node.args[1], keepdims=keeps)
