"""Gradient graphs that a device makes itself; run where onnxruntime is the training build."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from coordinator.onnx_export.operators import LOWERINGS
from coordinator.onnx_export.writer import IR_VERSION, OPSET, Writer
from edge_sdk.errors import ModelError
from edge_sdk.runtime.onnx_gradients import with_own_gradients
from edge_sdk.runtime.onnx_graphs import About, Graphs
from tests.coordinator.onnx_export.test_export import BLOCK, FAMILIES, compare_with_torch, tracer
from tests.runtimes import BACKENDS

ABOUT = About(blocks_path="blocks", kinds=(0,), task="causal-lm", head=())


def sent(operator: str) -> Graphs:
    """Graphs of a block of one operator; the others are not looked at."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("hidden", "out")]
    node = helper.make_node(operator, ["hidden"], ["out"])
    graph = helper.make_graph([node], "slice", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    others = {name: name.encode() for name in ("front", "vjp.0", "measure.0", "tail")}
    return Graphs(ABOUT, {**others, "block.0": model.SerializeToString()})


@pytest.mark.training_build
def test_the_training_build_is_what_is_imported() -> None:
    """The release that the extra asks for, from this environment, and a backend for it."""
    wanted = [one for one in metadata.requires("edgesplit") or [] if "runtime-training" in one]

    assert wanted[0].startswith(f"onnxruntime-training-cpu=={ort.__version__};")
    assert Path(ort.__file__).is_relative_to(sys.prefix)
    assert BACKENDS == ("torch", "onnxruntime", "onnxruntime-training")


@pytest.mark.training_build
@pytest.mark.parametrize("family", FAMILIES)
def test_own_gradients_are_those_of_the_model(family: str) -> None:
    """For every family that the conformance suite does not run, too, whatever the sizes."""
    made = tracer(family)
    block = Writer(made.block(BLOCK), LOWERINGS).write()

    own = with_own_gradients(Graphs(ABOUT, {"block.0": block}))

    compare_with_torch(made, made.block_vjp(BLOCK), own.models["vjp.0"])


@pytest.mark.training_build
def test_only_the_gradients_of_blocks_are_made_anew() -> None:
    """What is asked for importance, and the tail, stay as they were sent."""
    given = sent("Tanh")

    own = with_own_gradients(given)

    changed = [name for name, model in own.models.items() if model != given.models[name]]
    assert changed == ["vjp.0"]
    assert own.about == given.about


@pytest.mark.training_build
def test_an_operator_without_a_gradient_is_named() -> None:
    """One line that says which, and which backend to take."""
    with pytest.raises(ModelError, match="Sinh.*set backend to 'onnxruntime'") as caught:
        with_own_gradients(sent("Sinh"))
    assert "\n" not in str(caught.value)


def test_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files of two wheels lie in one folder, the line says what is wrong with them."""
    monkeypatch.setitem(sys.modules, "onnxruntime.capi._pybind_state", None)

    with pytest.raises(ModelError, match="makes no gradient graphs: it is no training build"):
        with_own_gradients(sent("Tanh"))
