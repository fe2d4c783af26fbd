"""What aten operators that move, pick and make numbers become in ONNX.

The others are in `onnx_ops.py`, which also makes the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from coordinator.onnx_ops import LAST, LOWERINGS, arg, axes, lowers, out
from coordinator.onnx_writer import Value, Writer
from edge_sdk.errors import ModelError

__all__ = ["LOWERINGS"]

# ---- moving ----


@lowers("view.default", "_unsafe_view.default", "reshape.default", "_reshape_copy.default")
def view(w: Writer, node: fx.Node) -> Value:
    """Another shape of the same numbers."""
    sizes = list(out(node).shape)
    varying = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    # One unknown size needs no arithmetic at run time.
    shape = w.shape([-1 if varying == [axis] else size for axis, size in enumerate(sizes)])
    return w.add("Reshape", w.value(node.args[0]), shape)


@lowers("transpose.int", "t.default", "permute.default")
def transpose(w: Writer, node: fx.Node) -> Value:
    """Another order of dimensions."""
    order = list(range(out(node).dim()))
    if str(node.target) == "aten.permute.default":
        order = axes(node, 1)
    else:
        swapped: Any = node.args[1:] or (0, 1)
        first, second = (axis % len(order) for axis in swapped)
        order[first], order[second] = order[second], order[first]
    return w.add("Transpose", w.value(node.args[0]), perm=order)


@lowers("unsqueeze.default")
def unsqueeze(w: Writer, node: fx.Node) -> Value:
    """A new dimension of size one."""
    return w.add("Unsqueeze", w.value(node.args[0]), w.ints(arg(node, 1)))


@lowers("squeeze.dim", "squeeze.dims")
def squeeze(w: Writer, node: fx.Node) -> Value:
    """Without dimensions of size one."""
    sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    gone = [axis for axis in axes(node, 1) if isinstance(sizes[axis], int) and sizes[axis] == 1]
    return w.add("Squeeze", w.value(node.args[0]), w.ints(*gone)) if gone else w.value(node.args[0])


@lowers("expand.default")
def expand(w: Writer, node: fx.Node) -> Value:
    """The same numbers many times."""
    x: Any = node.args[0]
    if tuple(x.meta["val"].shape) == tuple(out(node).shape):
        return w.value(x)
    return w.add("Expand", w.value(x), w.shape(out(node).shape))


@lowers("repeat.default")
def repeat(w: Writer, node: fx.Node) -> Value:
    """Copies along each dimension."""
    repeats: Any = node.args[1]
    x = w.value(node.args[0])
    for _ in range(len(repeats) - node.args[0].meta["val"].dim()):  # type: ignore[union-attr]
        x = w.add("Unsqueeze", x, w.ints(0))
    return w.add("Tile", x, w.shape(repeats))


@lowers("cat.default")
def cat(w: Writer, node: fx.Node) -> Value:
    """Tensors one behind the other."""
    dtype, parts = out(node).dtype, node.args[0]
    return w.add("Concat", *(w.operand(p, dtype) for p in parts), axis=arg(node, 1, 0))  # type: ignore[union-attr]


@lowers("stack.default")
def stack(w: Writer, node: fx.Node) -> Value:
    """Tensors side by side in a new dimension."""
    axis = arg(node, 1, 0)
    parts = (w.add("Unsqueeze", w.value(p), w.ints(axis)) for p in node.args[0])  # type: ignore[union-attr]
    return w.add("Concat", *parts, axis=axis)


@lowers("split.Tensor", "split_with_sizes.default", "unbind.int")
def split(w: Writer, node: fx.Node) -> Value:
    """Stretches along one dimension."""
    axis = arg(node, 1, 0) if str(node.target) == "aten.unbind.int" else arg(node, 2, 0)
    pieces = node.meta["val"]
    if str(node.target) == "aten.unbind.int":
        return [
            w.add("Gather", w.value(node.args[0]), w.operand(i, torch.int64), axis=axis)
            for i in range(len(pieces))
        ]
    sizes = w.shape([piece.shape[axis] for piece in pieces])
    return w.add_many("Split", [w.value(node.args[0]), sizes], len(pieces), axis=axis)


@lowers("getitem")
def getitem(w: Writer, node: fx.Node) -> Value:
    """One of several outputs."""
    return w.values(node.args[0])[node.args[1]]  # type: ignore[index]


# ---- picking ----


@lowers("slice.Tensor")
def slice_(w: Writer, node: fx.Node) -> Value:
    """Every so many entries of a stretch."""
    start, stop, step = arg(node, 2) or 0, arg(node, 3), arg(node, 4, 1)
    stop = LAST if stop is None else stop
    if (start, step) == (0, 1) and tuple(node.args[0].meta["val"].shape) == tuple(out(node).shape):  # type: ignore[union-attr]
        return w.value(node.args[0])
    ends = [w.size(start), w.size(stop), w.ints(arg(node, 1, 0)), w.size(step)]
    return w.add("Slice", w.value(node.args[0]), *ends)


@lowers("select.int")
def select(w: Writer, node: fx.Node) -> Value:
    """One entry of a dimension."""
    index = w.operand(node.args[2], torch.int64)
    return w.add("Gather", w.value(node.args[0]), index, axis=node.args[1])


@lowers("slice_backward.default", "select_backward.default")
def padded(w: Writer, node: fx.Node) -> Value:
    """The gradient of a stretch or an entry: zeros around it."""
    grad, sizes, axis = w.value(node.args[0]), node.args[1], arg(node, 2)
    rank = len(sizes)  # type: ignore[arg-type]
    axis %= rank
    whole = out(node).shape[axis]
    if str(node.target) == "aten.select_backward.default":
        grad = w.add("Unsqueeze", grad, w.ints(axis))
        start = arg(node, 3)
        kept: Any = 1
    else:
        if arg(node, 5) != 1:
            raise ModelError("onnxruntime: no translation of the gradient of a stretch with gaps")
        start = arg(node, 3)
        kept = node.args[0].meta["val"].shape[axis]  # type: ignore[union-attr]
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    start = whole + start if isinstance(start, int) and start < 0 else start
    before: list[Any] = [0] * rank
    after: list[Any] = [0] * rank
    before[axis], after[axis] = start, whole - kept - start
    return w.add("Pad", grad, w.shape([*before, *after]))


@lowers("embedding.default")
def embedding(w: Writer, node: fx.Node) -> Value:
    """Rows of a table; a table in half precision is widened after the look-up, not before."""
    table, ids = node.args[:2]
    source: Any = table
    while str(source.target) == "aten._to_copy.default":
        source = source.args[0]
    rows = w.add("Gather", w.value(source), w.value(ids), axis=0)
    is_wide = source.meta["val"].dtype == out(node).dtype
    return rows if is_wide else w.cast(rows, out(node).dtype)


@lowers("index_select.default")
def index_select(w: Writer, node: fx.Node) -> Value:
    """Some entries of a dimension."""
    return w.add("Gather", w.value(node.args[0]), w.value(node.args[2]), axis=node.args[1])


@lowers("gather.default")
def gather(w: Writer, node: fx.Node) -> Value:
    """One entry for each index."""
    return w.add("GatherElements", w.value(node.args[0]), w.value(node.args[2]), axis=node.args[1])


@lowers("scatter_add.default")
def scatter_add(w: Writer, node: fx.Node) -> Value:
    """Add values where the indices say."""
    x, axis, index, source = node.args
    terms = (w.value(n) for n in (x, index, source))
    return w.add("ScatterElements", *terms, axis=axis, reduction="add")


@lowers("index.Tensor")
def index(w: Writer, node: fx.Node) -> Value:
    """Look-up by one index for each of the first dimensions."""
    indices: Any = node.args[1]
    if any(entry is None for entry in indices):
        raise ModelError("onnxruntime: no translation of an index that leaves dimensions out")
    rest = node.args[0].meta["val"].dim() - len(indices)  # type: ignore[union-attr]
    picked = out(node).shape[: out(node).dim() - rest]
    shape = w.shape(picked)
    columns = (
        w.add("Unsqueeze", w.add("Expand", w.value(entry), shape), w.ints(-1)) for entry in indices
    )
    return w.add("GatherND", w.value(node.args[0]), w.add("Concat", *columns, axis=-1))


# ---- making ----


@lowers("arange.default", "arange.start", "arange.start_step")
def arange(w: Writer, node: fx.Node) -> Value:
    """Numbers in a row."""
    given = list(node.args)
    start, stop, step = ([0, *given] if len(given) == 1 else given)[:2] + [
        given[2] if len(given) > 2 else 1
    ]
    dtype = out(node).dtype
    if dtype.is_floating_point:
        return w.add("Range", *(w.operand(n, dtype) for n in (start, stop, step)))
    row = w.add("Range", *(w.operand(n, torch.int64) for n in (start, stop, step)))
    return row if dtype == torch.int64 else w.cast(row, dtype)


MADE = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


@lowers(*(f"{name}.default" for name in MADE), "full.default", "full_like.default")
@lowers("new_full.default", "scalar_tensor.default")
def full(w: Writer, node: fx.Node) -> Value:
    """One number everywhere."""
    name = str(node.target).split(".")[1]
    number = MADE[name] if name in MADE else arg(node, 0 if name == "scalar_tensor" else -1)
    number = node.args[1] if name in ("full", "full_like") else number
    number = node.args[2] if name == "new_full" else number
    value = w.operand(number, out(node).dtype)
    return w.add("Expand", value, w.shape(out(node).shape)) if out(node).dim() else value
