"""Descriptions of configuration dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from edge_sdk.config.describe import ConfigRow, describe
from edge_sdk.config.loader import SECRET


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A group."""

    steps: int = 100
    """Steps between
    two aggregations."""
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What others extend."""

    folder: Path = Path("runs")
    """Where runs go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Base):
    """A group of groups."""

    name: str
    token: str = field(default="abc", metadata=SECRET)
    inner: Inner = Inner(steps=5)
    many: dict[str, Inner] = field(default_factory=dict)
    maybe: Inner | None = None
    separator: str = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """A field no file could fill."""

    what: complex = 0j


def test_each_key_is_described() -> None:
    """Nested keys are dotted, defaults are the outer ones, the text is the string below."""
    rows = describe(Outer)

    assert rows[:5] == [
        ConfigRow("folder", "a path", "runs", "Where runs go."),
        ConfigRow("name", "text", "required", ""),
        ConfigRow("token", "text", "(secret)", ""),
        ConfigRow("inner.steps", "an integer", "5", "Steps between two aggregations."),
        ConfigRow("inner.mode", "'a' or 'b'", "a", ""),
    ]
    assert [row.key for row in rows[5:]] == [
        "many",
        "many.<name>.steps",
        "many.<name>.mode",
        "maybe",
        "maybe.steps",
        "maybe.mode",
        "separator",
    ]
    assert [row.default for row in rows[5:9]] == ["{}", "100", "a", "null"]
    assert rows[-1].default == r'"\n\n"'


def test_an_unsupported_annotation_is_a_mistake_of_ours() -> None:
    """A field type that no file can hold is refused when it is described."""
    with pytest.raises(TypeError, match="cannot be a <class 'complex'>"):
        describe(Odd)
