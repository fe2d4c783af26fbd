"""Where a run stands changes in one place, whoever acts for the run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from coordinator.rounds.state import RunState

ROOT = Path(__file__).parents[3]
FIELDS = {field.name for field in dataclasses.fields(RunState)}
READERS = {"num_steps", "expected", "soon", "decide"}
METHODS = {name for name, _ in inspect.getmembers(RunState, inspect.isfunction)} - READERS
MUTATORS = {"add", "discard", "remove", "pop", "update", "clear", "setdefault"}
OTHERS = sorted(
    path
    for path in [*ROOT.glob("coordinator/rounds/**/*.py"), *ROOT.glob("coordinator/lab/*/*.py")]
    if path.name not in ("run.py", "state.py") or path.parent.name != "rounds"
)


def is_state(node: ast.AST) -> bool:
    """Whether an expression is called `state`, whoever holds it."""
    return getattr(node, "id", getattr(node, "attr", "")) == "state"


def is_field(node: ast.AST) -> bool:
    """Whether an expression is a field of the state."""
    return isinstance(node, ast.Attribute) and is_state(node.value) and node.attr in FIELDS


def changes(node: ast.AST, methods: set[str]) -> bool:
    """Whether an expression sets a field, changes what one holds, or calls one of *methods*."""
    if isinstance(node, ast.Subscript):
        return is_field(node.value) and not isinstance(node.ctx, ast.Load)
    if not isinstance(node, ast.Attribute):
        return False
    if is_field(node.value) and node.attr in MUTATORS:
        return True
    is_set = is_field(node) and not isinstance(node.ctx, ast.Load)
    return is_set or (is_state(node.value) and node.attr in methods)


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_only_the_run_changes_where_it_stands(file: Path) -> None:
    """No other file sets a field of the state or calls a method of it that changes something."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    methods = METHODS if file.parent.name == "rounds" else set()  # elsewhere a state is another's

    assert [ast.unparse(node) for node in ast.walk(tree) if changes(node, methods)] == []


def test_the_rule_sees_what_it_is_for() -> None:
    """Each way to change a state is found, and reading it is allowed."""
    text = (
        "run.state.step = 1; state.begins['a'] = 2; state.ready.pop('a'); self._run.state.join(m)"
    )
    found = [node for node in ast.walk(ast.parse(text)) if changes(node, METHODS)]

    assert len(found) == 4
    reading = ast.parse("x = state.begins['a'] + state.step; state.ready.get('a'); state.decide()")
    assert not any(changes(node, METHODS) for node in ast.walk(reading))
