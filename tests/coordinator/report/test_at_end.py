"""A run that ends with a result leaves its report, whatever else becomes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.report import at_end
from coordinator.report.at_end import report_at_end
from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import RunFinished
from coordinator.results.run_folder import RunFolder
from tests.coordinator.report.test_write import CONFIG_OF, make_folder


class Listener:
    """Keeps what a person would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def see(self, event: RunEvent) -> None:
        """Keep its text."""
        self.lines += event.text.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has ended."""
    return make_folder(tmp_path / "demo")


@pytest.mark.parametrize(
    ("outcome", "wanted", "is_there"),
    [
        ("completed", True, True),
        ("stopped", True, True),
        ("paused", True, False),
        ("completed", False, False),
    ],
)
def test_a_result_has_a_report(
    folder: RunFolder, outcome: str, wanted: bool, is_there: bool
) -> None:
    """Of a run that is complete or stopped, not of a pause, and not where `report` is false."""
    listener = Listener()

    with report_at_end(replace(CONFIG_OF, report=wanted), folder, listener) as watcher:
        watcher.see(RunFinished(outcome))

    path = folder.path / "report.html"
    assert path.is_file() == is_there
    assert listener.lines == ([f"report: {path}"] if is_there else [])


def test_a_report_that_fails_ends_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says why, in the run's events as well."""

    def fail(*_: object) -> Path:
        raise KeyError("strange row")

    monkeypatch.setattr(at_end, "write_report", fail)
    listener = Listener()

    with report_at_end(CONFIG_OF, folder, listener) as watcher:
        watcher.see(RunFinished("completed"))

    assert listener.lines == ["no report: KeyError: 'strange row'"]
    assert folder.rows("events.jsonl")[-1]["event"] == "report.failed"


def test_the_command_writes_one_at_any_time(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`coordinator report RUN`, beside the run's files or where it is wanted."""
    out = tmp_path / "mine.html"

    assert main(["report", str(folder.path)]) == 0
    assert main(["report", str(folder.path), "--out", str(out)]) == 0

    assert capsys.readouterr().out.splitlines() == [
        f"report: {folder.path / 'report.html'}",
        f"report: {out}",
    ]
    assert out.read_text() == (folder.path / "report.html").read_text()
