"""A graph is a program of somebody else: what our exporter never writes is refused unseen."""

from __future__ import annotations

import ast
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coordinator.onnx_export import operators, writer
from edge_sdk.errors import ModelError
from edge_sdk.runtime.onnx_graphs import About, Graphs, read_graphs
from edge_sdk.runtime.onnx_rules import OPERATORS, checked_model
from edge_sdk.runtime.onnx_session import OnnxModel
from edge_sdk.runtime.onnx_sizes import Sizes, check_room, most_bytes

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SIZES = Sizes(B=4, T=16, N=128, R=8)
SECRET = b"the secret key of a device, 40 letters!!"


def model(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A model as our exporter makes them, of `hidden` (B, T, 8) to `out`."""
    graph = helper.make_graph(
        list(nodes),
        "slice",
        [helper.make_tensor_value_info("hidden", FLOAT, ["B", "T", 8])],
        [helper.make_tensor_value_info("out", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="edgesplit"
    )
    made.ir_version = 8
    return made


def plain() -> onnx.ModelProto:
    """A model that does nothing."""
    return model(helper.make_node("Identity", ["hidden"], ["out"]))


def node(made: onnx.ModelProto, op: str, **attributes: object) -> onnx.NodeProto:
    """The one node of a model, made another."""
    (one,) = made.graph.node
    one.CopyFrom(helper.make_node(op, ["hidden"], ["out"], **attributes))
    return one


# ---- what is refused ----


def external(made: onnx.ModelProto) -> None:
    """A constant that lies in another file."""
    tensor = made.graph.initializer.add(name="c0", data_type=FLOAT, dims=[10])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="device.key")


def external_and_here(made: onnx.ModelProto) -> None:
    """A constant that has bytes of its own and says that they lie elsewhere."""
    made.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.zeros(2, np.float32), "c0"))
    made.graph.initializer[0].external_data.add(key="location", value="train.jsonl")


def hollow(made: onnx.ModelProto) -> None:
    """A constant without bytes."""
    made.graph.initializer.add(name="c0", data_type=FLOAT, dims=[1 << 40])


def wrapped(made: onnx.ModelProto) -> None:
    """A constant whose size is more than 64 bits hold."""
    made.graph.initializer.add(name="c0", data_type=FLOAT, dims=[1 << 62, 4], raw_data=b"")


def texts(made: onnx.ModelProto) -> None:
    """A constant of texts."""
    made.graph.initializer.add(name="c0", data_type=TensorProto.STRING, dims=[0])


def sparse(made: onnx.ModelProto) -> None:
    """A constant that is sparse, with external data."""
    external(made)
    made.graph.sparse_initializer.add().values.CopyFrom(made.graph.initializer[0])
    del made.graph.initializer[:]


def function(made: onnx.ModelProto) -> None:
    """An operator that the model defines itself."""
    made.functions.add(name="Identity", domain="")


def domain(made: onnx.ModelProto) -> None:
    """An operator of another domain."""
    node(made, "Identity").domain = "com.microsoft"


def other_opset(made: onnx.ModelProto) -> None:
    """A second set of operators."""
    made.opset_import.add(domain="ai.onnx.ml", version=3)


def newer(made: onnx.ModelProto) -> None:
    """Another version of operators, which may mean something else."""
    made.opset_import[0].version = 21


def branch(made: onnx.ModelProto) -> None:
    """A graph inside a graph."""
    node(made, "If", then_branch=plain().graph, else_branch=plain().graph)


def loop(made: onnx.ModelProto) -> None:
    """Something that may never end."""
    node(made, "Loop", body=plain().graph)


def hidden_branch(made: onnx.ModelProto) -> None:
    """A graph as an attribute of an operator that has none."""
    node(made, "Identity", body=plain().graph)


def tensor_attribute(made: onnx.ModelProto) -> None:
    """A tensor as an attribute, which may lie in another file."""
    node(made, "Constant", value=numpy_helper.from_array(np.zeros(1, np.float32)))


def filled(made: onnx.ModelProto) -> None:
    """An operator that makes a tensor of any size."""
    node(made, "ConstantOfShape")


def drawn(made: onnx.ModelProto) -> None:
    """An operator that draws numbers."""
    node(made, "RandomNormalLike", mean=0.0)


def other_attribute(made: onnx.ModelProto) -> None:
    """An attribute that the operator does not have."""
    node(made, "Identity", axis=1)


def other_type(made: onnx.ModelProto) -> None:
    """An attribute of another type."""
    node(made, "Cast", to=[1])


def twice(made: onnx.ModelProto) -> None:
    """A value of two nodes."""
    made.graph.node.add().CopyFrom(made.graph.node[0])


def from_nowhere(made: onnx.ModelProto) -> None:
    """A value of no node, which may be one of the graph around it."""
    made.graph.node[0].input[0] = "secret"


def backwards(made: onnx.ModelProto) -> None:
    """Nodes that are not in their order."""
    made.graph.node[0].input[0] = "later"
    made.graph.node.append(helper.make_node("Identity", ["hidden"], ["later"]))


def metadata(made: onnx.ModelProto) -> None:
    """Something that no operator needs."""
    made.metadata_props.add(key="a", value="b")


def training(made: onnx.ModelProto) -> None:
    """Graphs for training beside the graph."""
    made.training_info.add().algorithm.CopyFrom(made.graph)


WRONG: list[tuple[Callable[[onnx.ModelProto], object], str]] = [
    (external, "field 13 of Tensor|field 14 of Tensor"),
    (external_and_here, "field 13 of Tensor"),
    (hollow, "bytes are not in it"),
    (wrapped, "bytes are not in it"),
    (texts, "no tensor of numbers"),
    (sparse, "field 15 of Graph"),
    (function, "field 25 of Model"),
    (domain, "field 7 of Node"),
    (other_opset, "one version of ONNX"),
    (newer, "one version of ONNX"),
    (branch, "field 6 of Attribute"),
    (loop, "field 6 of Attribute"),
    (hidden_branch, "field 6 of Attribute"),
    (tensor_attribute, "field 5 of Attribute"),
    (filled, "operator 'ConstantOfShape'"),
    (drawn, "operator 'RandomNormalLike'"),
    (other_attribute, "attribute that we never write"),
    (other_type, "attribute that we never write"),
    (twice, "that of another one"),
    (from_nowhere, "nothing before it computes"),
    (backwards, "nothing before it computes"),
    (metadata, "field 14 of Model"),
    (training, "field 20 of Model"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_what_we_never_write_is_refused(
    change: Callable[[onnx.ModelProto], object], text: str
) -> None:
    """A model with one thing that our exporter does not write is refused, with its name."""
    made = plain()
    checked_model(made.SerializeToString())
    change(made)
    with pytest.raises(ModelError, match=text):
        checked_model(made.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0ORTM", b"\x08\x08ORTM", b"\xff" * 20, b"\x3a\xff"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    """Nothing, onnxruntime's own format, garbage and a cut-off model are no graphs."""
    with pytest.raises(ModelError):
        checked_model(data)


def test_a_graph_that_occurs_twice_is_refused() -> None:
    """Protobuf would join two graphs; another reader takes the last one."""
    data = plain().SerializeToString()
    with pytest.raises(ModelError, match="twice"):
        checked_model(data + data)


def test_damage_is_an_error_of_the_model() -> None:
    """Whatever bytes are changed, what comes is a table or a ModelError, and nothing else."""
    data = plain().SerializeToString()
    draw = random.Random(0)
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        kept = draw.randrange(len(data) + 1) or None
        with contextlib.suppress(ModelError):
            most_bytes(checked_model(bytes(changed[:kept])), SIZES)


def packed(path: Path, models: dict[str, bytes]) -> Path:
    """A part with graphs, as a coordinator sends it."""
    about = About(blocks_path="blocks", kinds=(0,), task="causal-lm", head=())
    path.write_bytes(Graphs(about, models).pack())
    return path


def test_a_file_with_one_bad_graph_is_refused_as_a_whole(tmp_path: Path) -> None:
    """No graph of a part is used when one of them is refused; the message names it."""
    good, bad = plain(), plain()
    external(bad)
    models = {"block.0": good.SerializeToString(), "vjp.0": bad.SerializeToString()}
    with pytest.raises(ModelError, match=r"graph 'vjp.0' is refused"):
        read_graphs(packed(tmp_path / "a", models))
    with pytest.raises(ModelError, match="of a name that edgesplit never has"):
        read_graphs(packed(tmp_path / "b", {"other": good.SerializeToString()}))
    assert set(read_graphs(packed(tmp_path / "c", {"front": good.SerializeToString()})).models)


def test_a_model_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What slips past the rules finds no file: onnxruntime looks for data in a folder of nobody.

    Releases such as 1.19 do not know that option: there the rules stand alone.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "device.key").write_bytes(SECRET)
    bad = plain()
    external(bad)
    bad.graph.node[0].input[0] = "c0"
    about = About(blocks_path="blocks", kinds=(0,), task="causal-lm", head=())
    runtime = OnnxModel(Graphs(about, {"front": bad.SerializeToString()}), {})
    import onnxruntime as ort

    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31):
        pytest.skip("this onnxruntime knows no such option")
    ids, lengths = np.zeros((1, 1), np.int64), np.ones(1, np.int64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        runtime.enter(ids, lengths)


# ---- how large it becomes ----


def numbers(*values: int) -> np.ndarray:
    """A vector of sizes."""
    return np.array(values, np.int64)


def op(name: str, *inputs: str, to: str = "out", **attributes: object) -> onnx.NodeProto:
    """A node of one output."""
    return helper.make_node(name, list(inputs), [to], **attributes)


def doubled(times: int) -> onnx.ModelProto:
    """A tensor that is joined to itself again and again."""
    names = ["hidden", *(f"x{i}" for i in range(times - 1)), "out"]
    pairs = zip(names, names[1:], strict=False)
    return model(*(op("Concat", a, a, to=b, axis=2) for a, b in pairs))


BOMBS = {
    "expand": model(op("Expand", "hidden", "n"), n=numbers(4, 16, 10**9)),
    "expand a constant": model(op("Expand", "c", "n"), c=np.float32([0]), n=numbers(10**12)),
    "tile": model(op("Tile", "hidden", "n"), n=numbers(1, 1, 10**9)),
    "pad": model(op("Pad", "hidden", "n"), n=numbers(0, 0, 0, 0, 0, 10**10)),
    "range": model(op("Range", "a", "b", "c"), a=np.int64(0), b=np.int64(10**12), c=np.int64(1)),
    "concat": doubled(40),
    "product": model(
        op("Expand", "hidden", "n", to="x"),
        op("Reshape", "x", "m", to="y"),
        op("Reshape", "x", "k", to="z"),
        op("MatMul", "y", "z"),
        n=numbers(1, 1, 100000),
        m=numbers(-1, 1),
        k=numbers(1, -1),
    ),
    "broadcast": model(
        op("Reshape", "hidden", "m", to="y"),
        op("Unsqueeze", "y", "one", to="z"),
        *(op("Add", f"s{i}" if i else "y", "z", to=f"s{i + 1}") for i in range(1)),
        op("Tile", "s1", "n"),
        m=numbers(-1),
        one=numbers(1),
        n=numbers(10**5, 10**5),
    ),
    "sizes times sizes": model(
        op("Shape", "hidden", to="a", start=1, end=2),
        *(
            op("Mul", f"a{i}" if i else "a", f"a{i}" if i else "a", to=f"a{i + 1}")
            for i in range(3)
        ),
        op("Expand", "hidden", "a3"),
    ),
    "many that live at once": model(
        *(op("Expand", "hidden", "n", to=f"x{i}") for i in range(100)),
        op("Max", *(f"x{i}" for i in range(100))),
        n=numbers(4, 16, 10**6),
    ),
    "constants that stay": model(
        *(op("Expand", "c", "n", to=f"x{i}") for i in range(100)),
        op("Identity", "hidden"),
        c=np.float32([0]),
        n=numbers(10**8),
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_graph_that_takes_too_much_memory_is_not_loaded(case: str) -> None:
    """Whichever operator makes it large, it is refused as memory that is not there."""
    with pytest.raises(MemoryError, match=r"graph 'front' would take \S+ GB .* has 8 GB"):
        check_room({"front": BOMBS[case].SerializeToString()}, SIZES, 8e9)


UNKNOWN = {
    "of values": model(
        helper.make_node("Cast", ["hidden"], ["n"], to=INT64),
        op("Expand", "hidden", "n"),
    ),
    "wrapped": model(
        helper.make_node("Cast", ["c"], ["n"], to=TensorProto.UINT8),
        op("Expand", "hidden", "n"),
        c=numbers(-1),
    ),
    "by zero": model(op("Div", "c", "c"), c=numbers(0)),
    "below zero": model(op("Reshape", "hidden", "n"), n=numbers(-2)),
    "backwards": model(op("Range", "a", "a", "b"), a=np.int64(0), b=np.int64(-1)),
    "no axis": model(op("Concat", "hidden", "hidden")),
    "shape of a value": model(
        op("Identity", "hidden", to="x"), op("Shape", "x", to="n"), op("Expand", "hidden", "n")
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_size_that_cannot_be_followed_is_refused(case: str) -> None:
    """A size that depends on values, wraps or goes backwards is no size of ours."""
    with pytest.raises(ModelError, match=r"graph 'front' is refused: "):
        check_room({"front": UNKNOWN[case].SerializeToString()}, SIZES, 8e9)


def test_an_input_has_the_shape_that_we_give_it() -> None:
    """A graph cannot call a size of the model by the letter of one that is small."""
    made = plain()
    made.graph.input.append(helper.make_tensor_value_info("wte", FLOAT, ["B", "T"]))
    with pytest.raises(ModelError, match="a size that is not the model's"):
        check_room({"front": made.SerializeToString()}, SIZES, 8e9)
    made = plain()
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("hidden", FLOAT, ["T", "B", 8]))
    with pytest.raises(ModelError, match="another shape than we give it"):
        check_room({"front": made.SerializeToString()}, SIZES, 8e9)


# ---- what our exporter writes; its graphs are checked where tests make them (`runtimes.py`) ----


def test_every_operator_of_the_exporter_is_allowed_and_no_other() -> None:
    """The list is that of the exporter's source: nothing is missing, and nothing is idle."""
    written = set(operators.ELEMENTWISE.values()) | set(operators.UNARY.values())
    written |= set(operators.REDUCTIONS.values())
    for module in (operators, writer):
        for call in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                named = call.func.attr in ("add", "add_many", "make_node") and call.args
                for found in ast.walk(call.args[0]) if named else ():
                    if isinstance(found, ast.Constant) and str(found.value)[:1].isupper():
                        written.add(str(found.value))
    # Sizes are computed by operators of a table of their own, which is inside a function.
    assert written | {"Mod"} == set(OPERATORS)


def test_graphs_are_packed_and_read_back(tmp_path: Path) -> None:
    """Equal graphs give equal bytes, so that they have one hash."""
    about = About(blocks_path="model.layers", kinds=(0, 1), task="causal-lm", head=("h",))
    steps = (helper.make_node("Identity", [a], [b]) for a, b in (("hidden", "x"), ("x", "out")))
    front, tail = (graph.SerializeToString() for graph in (plain(), model(*steps)))
    graphs = Graphs(about, {"front": front, "tail": tail})
    twin = Graphs(about, {"tail": tail, "front": front})
    path = tmp_path / "graphs"
    path.write_bytes(graphs.pack())

    assert read_graphs(path) == graphs
    assert twin.pack() == graphs.pack()
