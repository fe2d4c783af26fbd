"""A `key=value` is completed from what a config may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from edge_sdk.client.config import ClientConfig
from edge_sdk.config.describe import describe
from edge_sdk.config.keys import KeyValues, known_keys


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    rate: float = 1.0
    names: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A config."""

    mode: Literal["fast", "far"] = "fast"
    quiet: bool = False
    file: Path | None = None
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


COMPLETE = KeyValues(lambda: Outer)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("ma", ["maybe.rate=", "maybe.names="]),
        ("inner.r", ["inner.rate="]),
        ("mode=", ["mode=fast", "mode=far"]),
        ("mode=fas", ["mode=fast"]),
        ("quiet=t", ["quiet=true"]),
        ("inner.rate=", []),
        ("unknown=", []),
    ],
)
def test_keys_then_choices(typed: str, words: list[str]) -> None:
    """Groups are dotted; what has no choices has no words."""
    assert COMPLETE(typed) == words


def test_a_path_is_completed_from_the_disk(tmp_path: Path) -> None:
    """Files and folders, the latter so that one can go on; brackets are a name's own."""
    (tmp_path / "a[1].jsonl").touch()
    (tmp_path / "a[1]").mkdir()

    found = COMPLETE(f"file={tmp_path}/a[1")

    assert found == [f"file={tmp_path}/a[1]/", f"file={tmp_path}/a[1].jsonl"]


def test_only_what_lies_below_a_key_is_offered() -> None:
    """A command that reads one group of a config takes no other key."""
    assert KeyValues(lambda: Outer, "inner.")("") == ["inner.rate=", "inner.names="]


def test_the_keys_are_those_of_the_documentation() -> None:
    """Every key of a device's config that has a name of ours, and no other."""
    documented = {row.key for row in describe(ClientConfig) if "<" not in row.key}

    assert {key for key, _ in known_keys(ClientConfig)} == {k for k in documented if "[" not in k}
