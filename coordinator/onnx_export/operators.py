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

from coordinator.onnx_export.writer import NUMPY_TYPES, Lowering, Value, Writer
from edge_sdk.errors import ModelError

LAST = 2**63 - 1
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Enter a function into the table under *names*."""

    def enter(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return enter


def out(node: fx.Node) -> torch.Tensor:
    """Return the tensor that *node* gives, without its data."""
    value = node.meta["val"]
    tensor: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return tensor


def arg(node: fx.Node, index: int, default: Any = None) -> Any:
    """Return a positional argument, or what stands for it."""
    return node.args[index] if index < len(node.args) else default


def axes(node: fx.Node, index: int) -> list[int]:
    """Return the dimensions that an argument names, none negative; all if it names none."""
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
    """Write an operator of two operands of one dtype."""
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
    """Return what decides the dtype of a comparison."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return value if isinstance(value, torch.Tensor | int | float | bool) else 0


@lowers("ne.Tensor", "ne.Scalar")
def not_equal(w: Writer, node: fx.Node) -> Value:
    """Write whether two operands differ."""
    dtype = torch.result_type(*map(_stand_in, node.args[:2]))
    same = w.add("Equal", w.operand(node.args[0], dtype), w.operand(node.args[1], dtype))
    return w.add("Not", same)


@lowers("rsub.Scalar", "rsub.Tensor")
def reversed_sub(w: Writer, node: fx.Node) -> Value:
    """Write the second operand less the first."""
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
    """Write an operator of one operand."""
    return w.add(UNARY[str(node.target).split(".")[1]], w.operand(node.args[0], out(node).dtype))


@lowers("silu.default")
def silu(w: Writer, node: fx.Node) -> Value:
    """Write the input times its sigmoid."""
    x = w.value(node.args[0])
    return w.add("Mul", x, w.add("Sigmoid", x))


@lowers("gelu.default")
def gelu(w: Writer, node: fx.Node) -> Value:
    """Write x times the normal distribution's share below x, or its approximation by tanh."""
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
    """Write a fixed power; small ones are multiplications, as Pow is slow."""
    x, exponent = w.operand(node.args[0], out(node).dtype), node.args[1]
    if exponent in (2, 3):
        square = w.add("Mul", x, x)
        return square if exponent == 2 else w.add("Mul", square, x)
    if exponent == 0.5:
        return w.add("Sqrt", x)
    return w.add("Pow", x, w.operand(exponent, out(node).dtype))


@lowers("where.self", "where.ScalarSelf", "where.ScalarOther")
def where(w: Writer, node: fx.Node) -> Value:
    """Write a choice between two operands."""
    condition, yes, no = node.args
    dtype = out(node).dtype
    return w.add("Where", w.value(condition), w.operand(yes, dtype), w.operand(no, dtype))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(w: Writer, node: fx.Node) -> Value:
    """Write a number where the mask is true."""
    x, mask, number = node.args
    dtype = out(node).dtype
    return w.add("Where", w.value(mask), w.operand(number, dtype), w.value(x))


@lowers("threshold_backward.default")
def threshold_backward(w: Writer, node: fx.Node) -> Value:
    """Write the gradient where the input was above the threshold, else 0."""
    grad, x, threshold = node.args
    dtype = out(node).dtype
    is_below = w.add("LessOrEqual", w.value(x), w.operand(threshold, dtype))
    return w.add("Where", is_below, w.operand(0.0, dtype), w.value(grad))


# ---- one expression each ----

LOWERINGS |= {
    **dict.fromkeys(
        ("alias.default", "clone.default", "detach.default", "lift_fresh_copy.default"),
        lambda w, node: w.value(node.args[0]),
    ),
    "rsqrt.default": lambda w, node: w.add("Reciprocal", w.add("Sqrt", w.value(node.args[0]))),
    "_to_copy.default": lambda w, node: w.operand(node.args[0], out(node).dtype),
    "bmm.default": lambda w, node: w.add("MatMul", *(w.value(a) for a in node.args)),
    **dict.fromkeys(
        ("_softmax.default", "_log_softmax.default"),
        lambda w, node: w.add(
            "LogSoftmax" if "log" in str(node.target) else "Softmax",
            w.operand(node.args[0], out(node).dtype),
            axis=node.args[1],
        ),
    ),
    "cumsum.default": lambda w, node: w.add(
        "CumSum",
        w.operand(node.args[0], out(node).dtype),
        w.constant(np.array(node.args[1], np.int64)),
    ),
    "argmax.default": lambda w, node: w.add(
        "ArgMax",
        w.value(node.args[0]),
        axis=node.args[1],
        keepdims=int(arg(node, 2, default=False)),
    ),
    "unsqueeze.default": lambda w, node: w.add(
        "Unsqueeze", w.value(node.args[0]), w.ints(arg(node, 1))
    ),
    "select.int": lambda w, node: w.add(
        "Gather", w.value(node.args[0]), w.operand(node.args[2], torch.int64), axis=node.args[1]
    ),
    "index_select.default": lambda w, node: w.add(
        "Gather", w.value(node.args[0]), w.value(node.args[2]), axis=node.args[1]
    ),
    "gather.default": lambda w, node: w.add(
        "GatherElements", w.value(node.args[0]), w.value(node.args[2]), axis=node.args[1]
    ),
}


# ---- products, norms and sums ----


@lowers("mm.default", "addmm.default")
def mm(w: Writer, node: fx.Node) -> Value:
    """Write a product of two matrices, perhaps added to a third; transposes are free."""
    *third, left, right = node.args
    (a, is_a), (b, is_b) = _untransposed(left), _untransposed(right)
    terms = [w.value(a), w.value(b), *(w.value(c) for c in third)]
    return w.add("Gemm", *terms, transA=is_a, transB=is_b)


def _untransposed(node: Any) -> tuple[Any, int]:
    """Return the matrix under a transpose, and whether there was one."""
    if str(node.target) in ("aten.transpose.int", "aten.t.default"):
        return node.args[0], 1
    return node, 0


@lowers("native_layer_norm.default")
def layer_norm(w: Writer, node: fx.Node) -> Value:
    """Write output, mean and one over the deviation."""
    given: Any = node.args
    x, shape, weight, bias, epsilon = given
    ones = np.ones(shape, NUMPY_TYPES[out(node).dtype])
    # Both even if there is none: onnxruntime-training knows no gradient without them.
    pairs = ((weight, ones), (bias, 0 * ones))
    inputs = [w.value(x), *(w.constant(c) if n is None else w.value(n) for n, c in pairs)]
    return w.add_many("LayerNormalization", inputs, 3, axis=-len(shape), epsilon=epsilon)


@lowers("_safe_softmax.default")
def safe_softmax(w: Writer, node: fx.Node) -> Value:
    """Write a softmax in which a row that is masked throughout is zero, not NaN."""
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
    """Write a sum or the like over some dimensions."""
    x = w.operand(node.args[0], out(node).dtype)
    over = axes(node, 1)
    kind = REDUCTIONS[str(node.target).removeprefix("aten.")]
    return w.add(kind, x, w.ints(*over), keepdims=int(arg(node, 2, default=False)))


# ---- moving ----


@lowers("view.default", "_unsafe_view.default", "reshape.default", "_reshape_copy.default")
def view(w: Writer, node: fx.Node) -> Value:
    """Write the same numbers in another shape."""
    sizes = list(out(node).shape)
    varying = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    # One unknown size needs no arithmetic at run time.
    shape = w.shape([-1 if varying == [axis] else size for axis, size in enumerate(sizes)])
    return w.add("Reshape", w.value(node.args[0]), shape)


@lowers("transpose.int", "t.default", "permute.default")
def transpose(w: Writer, node: fx.Node) -> Value:
    """Write the dimensions in another order."""
    order = list(range(out(node).dim()))
    if str(node.target) == "aten.permute.default":
        order = axes(node, 1)
    else:
        swapped: Any = node.args[1:] or (0, 1)
        first, second = (axis % len(order) for axis in swapped)
        order[first], order[second] = order[second], order[first]
    return w.add("Transpose", w.value(node.args[0]), perm=order)


@lowers("squeeze.dim", "squeeze.dims")
def squeeze(w: Writer, node: fx.Node) -> Value:
    """Leave out dimensions of size one."""
    sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    gone = [axis for axis in axes(node, 1) if isinstance(sizes[axis], int) and sizes[axis] == 1]
    return w.add("Squeeze", w.value(node.args[0]), w.ints(*gone)) if gone else w.value(node.args[0])


@lowers("expand.default")
def expand(w: Writer, node: fx.Node) -> Value:
    """Write the same numbers many times."""
    x: Any = node.args[0]
    if tuple(x.meta["val"].shape) == tuple(out(node).shape):
        return w.value(x)
    return w.add("Expand", w.value(x), w.shape(out(node).shape))


@lowers("repeat.default")
def repeat(w: Writer, node: fx.Node) -> Value:
    """Write copies along each dimension."""
    repeats: Any = node.args[1]
    x = w.value(node.args[0])
    for _ in range(len(repeats) - node.args[0].meta["val"].dim()):  # type: ignore[union-attr]
        x = w.add("Unsqueeze", x, w.ints(0))
    return w.add("Tile", x, w.shape(repeats))


@lowers("cat.default")
def cat(w: Writer, node: fx.Node) -> Value:
    """Write tensors one behind the other."""
    dtype, parts = out(node).dtype, node.args[0]
    return w.add("Concat", *(w.operand(p, dtype) for p in parts), axis=arg(node, 1, 0))  # type: ignore[union-attr]


@lowers("stack.default")
def stack(w: Writer, node: fx.Node) -> Value:
    """Write tensors side by side in a new dimension."""
    axis = arg(node, 1, 0)
    parts = (w.add("Unsqueeze", w.value(p), w.ints(axis)) for p in node.args[0])  # type: ignore[union-attr]
    return w.add("Concat", *parts, axis=axis)


@lowers("split.Tensor", "split_with_sizes.default", "unbind.int")
def split(w: Writer, node: fx.Node) -> Value:
    """Write stretches along one dimension, or each of its entries."""
    pieces = node.meta["val"]
    if str(node.target) == "aten.unbind.int":
        axis = arg(node, 1, 0)
        return [
            w.add("Gather", w.value(node.args[0]), w.operand(i, torch.int64), axis=axis)
            for i in range(len(pieces))
        ]
    axis = arg(node, 2, 0)
    sizes = w.shape([piece.shape[axis] for piece in pieces])
    return w.add_many("Split", [w.value(node.args[0]), sizes], len(pieces), axis=axis)


@lowers("getitem")
def getitem(w: Writer, node: fx.Node) -> Value:
    """Return one of several outputs."""
    return w.values(node.args[0])[node.args[1]]  # type: ignore[index]


# ---- picking ----


@lowers("slice.Tensor")
def slice_(w: Writer, node: fx.Node) -> Value:
    """Write every n-th entry of a stretch."""
    start, stop, step = arg(node, 2) or 0, arg(node, 3), arg(node, 4, 1)
    stop = LAST if stop is None else stop
    if (start, step) == (0, 1) and tuple(node.args[0].meta["val"].shape) == tuple(out(node).shape):  # type: ignore[union-attr]
        return w.value(node.args[0])
    ends = [w.size(start), w.size(stop), w.ints(arg(node, 1, 0)), w.size(step)]
    return w.add("Slice", w.value(node.args[0]), *ends)


@lowers("slice_backward.default", "select_backward.default")
def padded(w: Writer, node: fx.Node) -> Value:
    """Write the gradient of a stretch or an entry: zeros around it."""
    grad, sizes, axis = w.value(node.args[0]), node.args[1], arg(node, 2)
    rank = len(sizes)  # type: ignore[arg-type]
    axis %= rank
    whole, start, length = out(node).shape[axis], arg(node, 3), 1
    if str(node.target) == "aten.select_backward.default":
        grad = w.add("Unsqueeze", grad, w.ints(axis))
    elif arg(node, 5) != 1:
        raise ModelError("onnxruntime: no translation of the gradient of a stretch with gaps")
    else:
        length = node.args[0].meta["val"].shape[axis]  # type: ignore[union-attr]
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    start = whole + start if isinstance(start, int) and start < 0 else start
    before: list[Any] = [0] * rank
    after: list[Any] = [0] * rank
    before[axis], after[axis] = start, whole - length - start
    return w.add("Pad", grad, w.shape([*before, *after]))


@lowers("embedding.default")
def embedding(w: Writer, node: fx.Node) -> Value:
    """Write rows of a table; one in half precision is widened after the look-up, not before."""
    table, ids = node.args[:2]
    source: Any = table
    while str(source.target) == "aten._to_copy.default":
        source = source.args[0]
    rows = w.add("Gather", w.value(source), w.value(ids), axis=0)
    is_wide = source.meta["val"].dtype == out(node).dtype
    return rows if is_wide else w.cast(rows, out(node).dtype)


@lowers("scatter_add.default")
def scatter_add(w: Writer, node: fx.Node) -> Value:
    """Add values where the indices say."""
    x, axis, index, source = node.args
    terms = (w.value(n) for n in (x, index, source))
    return w.add("ScatterElements", *terms, axis=axis, reduction="add")


@lowers("index.Tensor")
def index(w: Writer, node: fx.Node) -> Value:
    """Look up by one index for each of the first dimensions."""
    indices: Any = node.args[1]
    rest = node.args[0].meta["val"].dim() - len(indices)  # type: ignore[union-attr]
    picked = out(node).shape[: out(node).dim() - rest]
    return w.add("GatherND", w.value(node.args[0]), _places(w, indices, picked))


@lowers("index_put.default")
def index_put(w: Writer, node: fx.Node) -> Value:
    """Write or add values where `index` would look them up."""
    indices: Any = node.args[1]
    dtype, rest = out(node).dtype, out(node).shape[len(indices) :]
    shapes = (entry.meta["val"].shape for entry in indices)
    picked: Any = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    updates = w.add("Expand", w.operand(node.args[2], dtype), w.shape((*picked, *rest)))
    reduction = "add" if arg(node, 3, False) else "none"
    x, places = w.value(node.args[0]), _places(w, indices, picked)
    return w.add("ScatterND", x, places, updates, reduction=reduction)


def _places(w: Writer, indices: Any, picked: Any) -> str:
    """Return the coordinates of what *indices* pick, of shape *picked*, in the first dimensions."""
    if any(entry is None for entry in indices):
        raise ModelError("onnxruntime: no translation of an index that leaves dimensions out")
    shape, last = w.shape(picked), w.ints(-1)
    columns = (w.add("Unsqueeze", w.add("Expand", w.value(i), shape), last) for i in indices)
    return w.add("Concat", *columns, axis=-1)


# ---- making ----


@lowers("arange.default", "arange.start", "arange.start_step")
def arange(w: Writer, node: fx.Node) -> Value:
    """Write numbers in a row."""
    given = [0, *node.args] if len(node.args) == 1 else node.args
    start, stop, step = [*given, 1][:3]
    dtype = out(node).dtype
    if dtype.is_floating_point:
        return w.add("Range", *(w.operand(n, dtype) for n in (start, stop, step)))
    row = w.add("Range", *(w.operand(n, torch.int64) for n in (start, stop, step)))
    return row if dtype == torch.int64 else w.cast(row, dtype)


MADE = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


@lowers(*(f"{name}.default" for name in MADE), "full.default", "full_like.default")
@lowers("new_full.default", "scalar_tensor.default")
def full(w: Writer, node: fx.Node) -> Value:
    """Write one number everywhere."""
    name = str(node.target).split(".")[1]
    number = MADE[name] if name in MADE else arg(node, 0 if name == "scalar_tensor" else -1)
    number = node.args[2 if name == "new_full" else 1] if "full" in name else number
    value = w.operand(number, out(node).dtype)
    return w.add("Expand", value, w.shape(out(node).shape)) if out(node).dim() else value
