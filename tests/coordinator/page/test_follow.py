"""A run's files are read piece by piece, and what is read is what stands there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.page import follow
from coordinator.page.follow import FollowedFolder
from coordinator.results.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty run."""
    return RunFolder.create(tmp_path, "run")


def test_only_new_lines_are_read(folder: RunFolder) -> None:
    """The rows are those of the whole file, whenever it is looked at."""
    followed = FollowedFolder(folder.path)
    assert followed.rows("metrics.jsonl") == []

    for number in range(5):
        folder.append("metrics.jsonl", {"round": number})
        assert followed.rows("metrics.jsonl") == folder.rows("metrics.jsonl")


def test_a_line_that_is_being_written_waits(folder: RunFolder) -> None:
    """Half a line is no row; whole, it is."""
    path, followed = folder.path / "events.jsonl", FollowedFolder(folder.path)
    path.write_text('{"event": "a"}\n{"eve')
    assert [row["event"] for row in followed.rows("events.jsonl")] == ["a"]

    path.write_text('{"event": "a"}\n{"event": "b"}\n')

    assert [row["event"] for row in followed.rows("events.jsonl")] == ["a", "b"]


def test_a_file_that_is_written_anew_is_read_anew(folder: RunFolder) -> None:
    """Rows that a resumed run drops are gone here, too."""
    followed = FollowedFolder(folder.path)
    for number in range(4):
        folder.append("metrics.jsonl", {"round": number})
    assert len(followed.rows("metrics.jsonl")) == 4

    folder.drop_rows_from("metrics.jsonl", 2)
    folder.append("metrics.jsonl", {"round": 2, "again": True})

    assert followed.rows("metrics.jsonl") == folder.rows("metrics.jsonl")


def test_what_is_no_row_is_passed_over(folder: RunFolder) -> None:
    """Garbage, deep nesting and other values end nothing."""
    lines = ["{", "[1]", "[" * 100_000, '"x"', "\x00", json.dumps({"event": "good"})]
    (folder.path / "events.jsonl").write_text("\n".join(lines) + "\n")

    assert FollowedFolder(folder.path).rows("events.jsonl") == [{"event": "good"}]


def test_the_newest_rows_are_kept(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a file grows, so many rows of it are held and no more."""
    monkeypatch.setattr(follow, "MOST_ROWS", 3)
    followed = FollowedFolder(folder.path)
    for number in range(8):
        folder.append("events.jsonl", {"event": number})

    assert [row["event"] for row in followed.rows("events.jsonl")] == [5, 6, 7]
