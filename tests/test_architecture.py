"""profiler <- edge_sdk <- coordinator: an import never goes the other way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "profiler": {"profiler"},
    "edge_sdk": {"profiler", "edge_sdk"},
    "coordinator": {"profiler", "edge_sdk", "coordinator"},
}
# A third-party library enters through one door, so that replacing it touches one file.
DOORS = {
    "msgpack": ["edge_sdk/protocol/headers.py"],
    "zmq": [
        "edge_sdk/transport/*.py",
        "coordinator/gateway/*.py",
    ],
    "pynvml": ["profiler/sensors/sources.py"],
    "onnxruntime": ["edge_sdk/runtime/onnx_session.py"],
    # Bytes from a peer must never be able to run code; there is no door at all.
    "pickle": [],
    "cloudpickle": [],
    "dill": [],
    "marshal": [],
    "shelve": [],
}
HEAVY = ["torch", "transformers", "peft", "onnxruntime", "accelerate", "ray"]
MAX_LINES = 350
# Folders of one machine or one person; /proc and /sys are the same everywhere.
SOMEBODYS_PATH = re.compile(r"^(/home|/root|/Users|/work|/mnt|/opt|/tmp|/data)(/|$)")
FILES = [
    str(path.relative_to(ROOT))
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
]


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


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_lies_below_it(name: str) -> None:
    """Imports between our packages go down the chain."""
    packages = {module.split(".")[0] for module in imported_modules(parsed(name))}
    assert packages & MAY_IMPORT.keys() <= MAY_IMPORT[name.split("/")[0]]


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


@pytest.mark.parametrize("name", FILES)
def test_a_file_stays_short(name: str) -> None:
    """A file that outgrows the limit holds two ideas and is cut between them."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES


@pytest.mark.parametrize("name", FILES)
def test_a_file_knows_nobodys_folders(name: str) -> None:
    """No absolute path of one machine stands in the packages, and nothing but ASCII."""
    text = (ROOT / name).read_text(encoding="utf-8")
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert text.isascii()
    assert [
        value for value in constants if isinstance(value, str) and SOMEBODYS_PATH.match(value)
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
