"""The second form of a backward pass: gradient graphs that the device makes by itself.

onnxruntime's training build differentiates the forward graph of each block, which every device
without torch is sent; what it makes takes the place of the graph that the coordinator has traced,
and has the same inputs and outputs. Only importer of onnx on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx
import onnxruntime as ort

from edge_sdk.errors import ModelError, one_line
from edge_sdk.runtime.onnx_graphs import FOLDED, Graphs
from edge_sdk.runtime.onnx_session import confined_options


def with_own_gradients(graphs: Graphs) -> Graphs:
    """Return *graphs* with every `vjp.<kind>` made here; the other graphs stay as they were sent.

    Raises:
        ModelError: this onnxruntime is no training build, or knows no gradient of an operator.
    """
    kinds = sorted(set(graphs.about.kinds))
    forms = ("", FOLDED) if graphs.can_fold else ("",)
    own = {
        f"{form}vjp.{kind}": _gradient(graphs.models[f"{form}block.{kind}"])
        for kind in kinds
        for form in forms
    }
    return replace(graphs, models={**graphs.models, **own})


def _gradient(block: bytes) -> bytes:
    """Return the graph that takes a block's inputs and `grad`, and gives `grad:<input>`."""
    try:
        # Not from onnxruntime.training: that imports torch.
        from onnxruntime.capi._pybind_state import GradientGraphBuilder, get_optimized_model
    except ImportError as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} makes no gradient graphs: it is no training build"
        ) from error
    forward = onnx.load_from_string(block)
    _give_norms_their_own(forward.graph)
    _keep_dead_rows_finite(forward.graph)
    (output,) = forward.graph.output
    names = [entry.name for entry in forward.graph.input]
    trained = {name for name in names if name == "hidden" or name.endswith((".A", ".B"))}
    options = confined_options()
    try:
        # Fused first: there are kernels for the gradient of some operators together.
        fused = get_optimized_model(forward.SerializeToString(), trained, options)
        # No loss: the gradient of the output comes from outside.
        builder = GradientGraphBuilder(fused, {output.name}, trained, "", options)
        builder.build()
        model = onnx.load_from_string(builder.get_model())
    except Exception as error:  # noqa: BLE001 - onnxruntime has many, without a base
        raise ModelError(
            f"onnxruntime-training makes no gradient of a block: {one_line(error)}; "
            "set backend to 'onnxruntime'"
        ) from error
    grad = model.graph.input.add()
    grad.CopyFrom(output)
    grad.name = f"{output.name}_grad"
    _rename(model.graph, {f"{n}_grad": f"grad:{n}" for n in trained} | {grad.name: "grad"})
    return bytes(model.SerializeToString())


def _give_norms_their_own(graph: onnx.GraphProto) -> None:
    """Share no constant among norms: the builder names a gradient of each after it, asked or not.

    The writer keeps equal constants once: zeros, where norms have no bias.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if node.op_type == "LayerNormalization" and name in constants:
                own = graph.initializer.add()
                own.CopyFrom(constants[name])
                own.name = node.input[place] = f"{node.name}.{place}"


def _keep_dead_rows_finite(graph: onnx.GraphProto) -> None:
    """Let a softmax see zeros where its row is masked throughout and is made zero afterwards.

    Forwards the NaN of such a row goes nowhere; the gradient of the softmax multiplies by it.
    """
    nodes = list(graph.node)
    softmaxes = {node.output[0]: node for node in nodes if node.op_type == "Softmax"}
    guards: dict[str, onnx.NodeProto] = {}
    for where in nodes:
        if where.op_type == "Where" and where.input[2] in softmaxes:
            softmax = softmaxes[where.input[2]]
            is_dead, zero, scores = where.input[0], where.input[1], softmax.input[0]
            softmax.input[0] = f"{softmax.name}.alive"
            alive = onnx.helper.make_node("Where", [is_dead, zero, scores], list(softmax.input))
            guards[softmax.name] = alive
    del graph.node[:]
    for node in nodes:
        graph.node.extend([guards[node.name], node] if node.name in guards else [node])


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for entry in (*graph.input, *graph.output):
        entry.name = names.get(entry.name, entry.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
