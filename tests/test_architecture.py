"""The house: who may import whom, through which doors, and how large a room may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms of each package from the ground up: one imports only those before it, and of its own
# line none. `docs/architecture.md` draws them.
ORDER = {
    "profiler": [
        ["door", "completion"],
        ["sensors"],
        ["estimate"],
        ["profile"],
        ["measure"],
        ["live_view"],
        ["cli"],
    ],
    "edge_sdk": [
        ["errors"],
        ["deadline", "duration", "files", "names"],
        ["held_states", "running_note", "home"],
        ["config"],
        ["protocol"],
        ["transport", "accept"],
        ["model"],
        ["lora"],
        ["data"],
        ["runtime"],
        ["client"],
        ["doctor", "preview"],
        ["supervise", "arguments", "enrol"],
        ["command"],
        ["cli"],
    ],
    "coordinator": [
        ["aggregation"],
        ["config"],
        ["planning"],
        ["gateway", "onnx_export", "remote"],
        ["engine", "fleet"],
        ["results"],
        ["steering", "scores"],
        ["export", "page", "tracking", "report"],
        ["rounds"],
        ["lab"],
        ["commands"],
        ["cli"],
    ],
}
MAY_IMPORT = {
    "profiler": {"profiler"},
    "edge_sdk": {"profiler", "edge_sdk"},
    "coordinator": {"profiler", "edge_sdk", "coordinator"},
}
# What a room must not know although it lies below: the link knows no model, the model no link.
STRANGERS = {
    "edge_sdk.transport": {"edge_sdk.model", "edge_sdk.lora", "edge_sdk.data", "edge_sdk.runtime"},
    "edge_sdk.model": {"edge_sdk.transport"},
    "edge_sdk.lora": {"edge_sdk.transport"},
    "edge_sdk.data": {"edge_sdk.transport"},
    "edge_sdk.runtime": {"edge_sdk.transport"},
}
# A third-party library enters through one door, so that replacing it touches one file.
DOORS = {
    "msgpack": ["edge_sdk/protocol/headers.py"],
    "msgspec": ["edge_sdk/protocol/headers.py"],
    "zmq": ["edge_sdk/transport/*.py", "coordinator/gateway/*.py"],
    "segno": ["coordinator/commands/devices/enrol.py"],
    "pynvml": ["profiler/sensors/sources.py"],
    "argcomplete": ["profiler/completion.py"],
    "onnxruntime": ["edge_sdk/runtime/onnx_session.py", "edge_sdk/runtime/onnx_gradients.py"],
    "tensorboard": ["coordinator/tracking/to_tensorboard.py"],
    "wandb": ["coordinator/tracking/to_wandb.py"],
    "mlflow": ["coordinator/tracking/to_mlflow.py"],
    "prometheus_client": ["coordinator/tracking/to_prometheus.py"],
    "starlette": ["coordinator/page/serving.py"],
    "uvicorn": ["coordinator/page/serving.py"],
    "plotly": ["coordinator/page/serving.py"],
    "sacrebleu": ["coordinator/scores/mteval.py"],
    "pycocoevalcap": ["coordinator/scores/captions.py"],
    "ray": ["coordinator/engine/ray/cluster.py"],
    # Bytes from a peer must never be able to run code; there is no door at all.
    "pickle": [],
    "cloudpickle": [],
    "dill": [],
    "marshal": [],
    "shelve": [],
}
HEAVY = ["torch", "transformers", "peft", "onnxruntime", "accelerate", "ray"]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 50
MAX_FILES, MAX_PARAMETERS, MAX_METHODS, MAX_DEPTH = 15, 7, 20, 12
# Exceptions to the sizes, each with its reason.
LONG_FILES: dict[str, str] = {}
MANY_PARAMETERS = {
    "edge_sdk/runtime/torch_runtime.py:__init__": "A model, a plan and a training, in their parts: "
    "tests and benchmarks make each of them without the others.",
}
MANY_METHODS = {
    "coordinator/engine/ray/actor.py:StageActor": "What the coordinator asks of a process that has "
    "a stage: each is one call.",
}
# Folders of one machine or one person; /proc and /sys are the same everywhere.
SOMEBODYS_PATH = re.compile(r"^(/home|/root|/Users|/work|/mnt|/opt|/tmp|/data)(/|$)")

FILES = [
    str(path.relative_to(ROOT))
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
]
MODULES = {
    name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES
}
ROOMS = sorted(
    str(Path(name).parent) for name in FILES if name.count("/") > 1 and name.endswith("__init__.py")
)


@cache
def parsed(name: str) -> ast.Module:
    """Return the syntax tree of one of our files."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names imported anywhere in *tree*, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def own_imports(name: str) -> frozenset[str]:
    """Return those modules of ours that a file imports, packages' doors left out."""
    return frozenset(
        module
        for module in imported_modules(parsed(name))
        if module in MODULES and not MODULES[module].endswith("__init__.py")
    )


def module_of(name: str) -> str:
    """Return the dotted name of one of our files."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def floor_of(module: str) -> int:
    """Return how high the room of *module* lies in its package."""
    package, room = module.split(".")[:2]
    return next(floor for floor, rooms in enumerate(ORDER[package]) if room in rooms)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_packages_below_it(name: str) -> None:
    """Imports between our packages go down the chain profiler <- edge_sdk <- coordinator."""
    packages = {module.split(".")[0] for module in imported_modules(parsed(name))}

    assert packages & MAY_IMPORT.keys() <= MAY_IMPORT[name.split("/")[0]]


@pytest.mark.parametrize("name", [name for name in FILES if name.count("/") > 1])
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    """Inside a package imports go down its order; rooms of one line know nothing of each other."""
    me = module_of(name)
    package, room = me.split(".")[:2]
    others = [m for m in own_imports(name) if m.startswith(f"{package}.")]

    assert [
        module
        for module in sorted(others)
        if module.split(".")[1] != room and floor_of(module) >= floor_of(me)
    ] == []


@pytest.mark.parametrize("room", STRANGERS)
def test_link_and_model_do_not_know_each_other(room: str) -> None:
    """What carries messages imports nothing of a model, and what computes nothing of a link."""
    known = {
        ".".join(module.split(".")[:2])
        for name in FILES
        if name.startswith(f"{room.replace('.', '/')}/")
        for module in own_imports(name)
    }

    assert known & STRANGERS[room] == set()


@pytest.mark.parametrize("name", FILES)
def test_a_room_is_entered_by_its_public_modules(name: str) -> None:
    """From outside of a sub-package only the modules in its `__all__` are imported."""
    own = Path(name).parent
    for module in own_imports(name):
        folder = Path(MODULES[module]).parent
        if folder == own or folder.parent == Path():
            continue

        assert module.rsplit(".", 1)[1] in public_modules(str(folder / "__init__.py")), module


@cache
def public_modules(init: str) -> frozenset[str]:
    """Return the names in the `__all__` of a sub-package."""
    for node in parsed(init).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_what_is_there(room: str) -> None:
    """The `__all__` of a sub-package is sorted, and each name is a module or a folder in it."""
    names = [
        ast.literal_eval(node.value)
        for node in parsed(f"{room}/__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ][0]
    there = {path.stem for path in (ROOT / room).iterdir() if path.suffix == ".py" or path.is_dir()}

    assert names == sorted(names)
    assert set(names) <= there


@pytest.mark.parametrize("name", FILES)
def test_private_names_stay_at_home(name: str) -> None:
    """No file imports a name with a leading underscore from another."""
    assert [
        alias.name
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MAY_IMPORT
        for alias in node.names
        if alias.name.startswith("_")
    ] == []


@pytest.mark.parametrize("name", FILES)
def test_a_library_enters_through_its_door(name: str) -> None:
    """A library with a door is imported there and nowhere else; pickle has none."""
    packages = {module.split(".")[0] for module in imported_modules(parsed(name))}

    assert [
        package
        for package in sorted(packages & DOORS.keys())
        if not any(fnmatch(name, door) for door in DOORS[package])
    ] == []


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("coordinator/")])
def test_the_device_needs_no_torch_distributed(name: str) -> None:
    """Nothing that runs on a device names torch.distributed: wheels for Jetson lack it."""
    tree = parsed(name)
    mentions = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    mentions |= set(imported_modules(tree))

    assert [name for name in sorted(mentions) if name.startswith("torch.distributed")] == []


def test_imports_run_in_no_circle_and_not_deep() -> None:
    """No module imports itself by way of others, and no chain in `coordinator` passes 12 files."""
    depth: dict[str, int] = {}
    path: list[str] = []

    def measure(module: str) -> int:
        assert module not in path, " -> ".join([*path, module])
        if module not in depth:
            path.append(module)
            below = [measure(other) for other in own_imports(MODULES[module]) if other != module]
            depth[module] = max(below, default=0) + module.startswith("coordinator.")
            path.pop()
        return depth[module]

    assert max(measure(module) for module in MODULES) <= MAX_DEPTH


@pytest.mark.parametrize("name", FILES)
def test_a_file_stays_short(name: str) -> None:
    """A file that outgrows the limit holds two nouns and is cut between them."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()

    assert len(lines) <= MAX_FILE_LINES or name in LONG_FILES


@pytest.mark.parametrize("name", FILES)
def test_functions_and_classes_stay_small(name: str) -> None:
    """Functions have at most 50 lines and 7 parameters, classes at most 20 public methods."""
    for node in ast.walk(parsed(name)):
        where = f"{name}:{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, where
            assert num_parameters(node) <= MAX_PARAMETERS or where in MANY_PARAMETERS, where
        elif isinstance(node, ast.ClassDef):
            methods = [
                child.name
                for child in node.body
                if isinstance(child, ast.FunctionDef)
                and not child.name.startswith("_")
                and not child.decorator_list  # a property is no method
            ]
            assert len(methods) <= MAX_METHODS or where in MANY_METHODS, where


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count what a caller gives, `self` and what has a default left out."""
    given = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
    keywords = sum(default is None for default in node.args.kw_defaults)
    return len(given) - len(node.args.defaults) + keywords


def test_folders_stay_small() -> None:
    """A folder holds at most 15 files beside its `__init__.py`."""
    counts = Counter(str(Path(name).parent) for name in FILES if not name.endswith("__init__.py"))

    assert {folder: n for folder, n in counts.items() if n > MAX_FILES} == {}


def test_a_class_has_a_name_of_its_own() -> None:
    """No two public classes of the product share a name: a search finds the one that is meant."""
    counts = Counter(
        node.name
        for name in FILES
        for node in parsed(name).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )

    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("exceptions", [LONG_FILES, MANY_PARAMETERS, MANY_METHODS])
def test_an_exception_is_needed(exceptions: Mapping[str, str]) -> None:
    """What is excepted from a size still exists, and the reason is a sentence."""
    assert [where for where in exceptions if not (ROOT / where.split(":")[0]).is_file()] == []
    assert [reason for reason in exceptions.values() if not reason.endswith(".")] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_knows_nobodys_folders(name: str) -> None:
    """No absolute path of one machine stands in the packages, and nothing but ASCII."""
    text = (ROOT / name).read_text(encoding="utf-8")
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]

    assert text.isascii()
    assert [
        value for value in constants if isinstance(value, str) and SOMEBODYS_PATH.match(value)
    ] == []


@pytest.mark.parametrize("name", FILES)
def test_a_mentioned_file_exists(name: str) -> None:
    """A file that a docstring or comment names between backticks is there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tails = {f"/{other}" for other in FILES}

    assert [
        word
        for word in re.findall(r"`([\w/]+\.py)`", text)
        if not any(tail.endswith(f"/{word}") for tail in tails) and not (ROOT / word).is_file()
    ] == []


@pytest.mark.parametrize(
    "module", ["profiler", "profiler.cli", "edge_sdk", "edge_sdk.config.loader"]
)
def test_an_import_is_light(module: str) -> None:
    """Importing the SDK on a board loads neither torch nor anything built on it."""
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"

    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    assert output.stdout.strip() == "[]"
