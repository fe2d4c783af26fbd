"""The `profiler` command."""

from __future__ import annotations

import json

import pytest

from profiler import cli
from profiler.readings import unknown


def test_show_prints_every_reading(capsys: pytest.CaptureFixture[str]) -> None:
    """For people: one line per reading, with its unit and its source."""
    assert cli.main(["show"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "memory_total",
        "memory_available",
        "process_rss",
        "process_peak_rss",
        "cores",
        "python",
        "platform",
    ]
    assert "MiB" in lines[0]


def test_show_as_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs: one JSON object, values in base units."""
    assert cli.main(["show", "--format", "json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    assert facts["process_rss"]["unit"] == "B"
    assert facts["process_rss"]["value"] > 2**20
    assert facts["cores"]["value"] > 0


def test_what_is_not_known_is_not_made_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown reading is shown as unknown, and as null to programs."""
    monkeypatch.setattr(cli, "allowed_cores", lambda: unknown("cores"))

    cli.main(["show"])
    text = capsys.readouterr().out
    cli.main(["show", "--format", "json"])

    assert text.splitlines()[4].split()[1] == "unknown"
    assert json.loads(capsys.readouterr().out)["cores"]["value"] is None
