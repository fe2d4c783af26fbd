"""Run a function once on tensors without data; a graph of aten operators comes out.

Sizes that vary are symbols in it. Knows no model, no ONNX and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.errors import ModelError, one_line

aten = torch.ops.aten
# Everything else is translated as it is; these have no counterpart in ONNX.
DECOMPOSED = (
    aten.native_layer_norm_backward,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
    aten.gelu_backward,
    aten.silu_backward,
    aten.tanh_backward,
    aten.sigmoid_backward,
    aten.detach,
    aten.t,
    aten.fill,
    aten.expand_copy,
    aten.squeeze_copy,
)
# Sizes that vary, by the letter that stands for them, and what they are while tracing: 0 and 1
# would be taken for fixed. Every R may be another: the writer lets nothing be computed from one.
SIZES = {"B": 3, "T": 11, "N": 7, "R": 5}


class Input(NamedTuple):
    """One input of a graph."""

    shape: tuple[int | str, ...]
    """Sizes; a letter of `SIZES` for one that varies."""
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Traced:
    """A graph of aten operators; inputs and outputs in their order."""

    graph: fx.GraphModule
    inputs: dict[str, Input]
    outputs: tuple[str, ...]


def trace(
    run: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]],
    inputs: dict[str, Input],
    outputs: tuple[str, ...],
    largest: int = SIZES["T"],
) -> Traced:
    """Run *run* once on tensors without data.

    Args:
        run: Inputs by name to outputs.
        inputs: What *run* is given.
        outputs: Names of what it returns.
        largest: Size up to which the graph must hold.

    Raises:
        ModelError: The model's code decides by values or by sizes, or fixes one that varies.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # it costs more than it saves: sizes that vary seldom hit
    sizes = _symbols(mode)
    with mode:
        fakes = [
            torch.empty([sizes.get(n, n) for n in entry.shape], dtype=entry.dtype)
            for entry in inputs.values()
        ]

    def flat(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return run(dict(zip(inputs, values, strict=True)))

    table: Any = get_decompositions(DECOMPOSED)
    make = make_fx(
        flat,
        decomposition_table=table,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    try:
        with mode, sdpa_kernel([SDPBackend.MATH]):
            graph = make(*fakes)
    except Exception as error:  # noqa: BLE001 - somebody else's model code may raise anything
        raise ModelError(f"cannot be traced for onnxruntime: {one_line(error)}") from error
    graph.graph.eliminate_dead_code()
    _require_dynamic(graph, inputs)
    _require_undecided(env, largest)
    return Traced(graph, inputs, outputs)


def _symbols(mode: FakeTensorMode) -> dict[Any, Any]:
    """Return a symbol for each size that varies."""
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(SIZES))
    example = mode.from_tensor(
        torch.empty(list(SIZES.values()), device="meta"),
        symbolic_context=dynamic,
        source=ConstantSource("sizes"),
    )
    return dict(zip(SIZES, example.shape, strict=True))


def _require_dynamic(graph: fx.GraphModule, inputs: Mapping[str, Input]) -> None:
    """Refuse a model whose code has fixed a size that varies."""
    nodes = graph.graph.find_nodes(op="placeholder")
    for node, (name, entry) in zip(nodes, inputs.items(), strict=True):
        for letter, size in zip(entry.shape, node.meta["val"].shape, strict=True):
            if isinstance(letter, str) and (isinstance(size, int) or size.node.expr.is_number):
                raise ModelError(f"the model's code fixes size {letter} of {name!r} to {size}")


def _require_undecided(env: ShapeEnv, largest: int) -> None:
    """Refuse code that does not do the same with small sizes as with large ones.

    2 is the smallest that tracing tells apart from others; what code does with 1 is the same or
    means the same in all models of the tests.
    """
    for guard in env.guards:
        expression: Any = guard.expr
        # Equal or not is how torch tells sizes of 1 apart; it says nothing about the result.
        if expression.is_Relational and not isinstance(expression, sympy.Eq | sympy.Ne):
            for size in (2, largest):
                if expression.subs(dict.fromkeys(expression.free_symbols, size)) == sympy.false:
                    raise ModelError(f"the model's code asks whether {expression}: not for {size}")
