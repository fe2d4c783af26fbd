"""The page beside a run is a process of its own: neither ends, or harms, the other."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from coordinator.page.beside import page_beside
from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import FolderKnown, RunStarted
from edge_sdk.deadline import Deadline
from tests.coordinator.page.recorded import Recording
from tests.e2e.programs import free_port

WAIT_S = 30.0
PARENT = """
import sys, time
from pathlib import Path
from coordinator.page.beside import page_beside
from coordinator.results.events.run import FolderKnown
from coordinator.results.watchers import Watchers

with page_beside(sys.argv[2], None, Watchers()) as shown:
    shown.see(FolderKnown(Path(sys.argv[1])))
    print("begun", flush=True)
    time.sleep(60)
"""


class Notes:
    """A watcher that keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[RunEvent] = []

    def see(self, event: RunEvent) -> None:
        """Keep it."""
        self.seen.append(event)


def ask(port: int) -> str:
    """Return the name of the run that a page shows."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        line.request("GET", "/state")
        return str(json.loads(line.getresponse().read())["set"]["run"]["name"])
    finally:
        line.close()


def wait_until_gone(port: int) -> None:
    """Wait until nothing serves there any more."""
    deadline = Deadline.after(WAIT_S)
    while deadline.left_s():
        try:
            ask(port)
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the page is still there")


def processes_below(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_page_that_dies_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run's watcher goes on, and the log says once that the page has ended."""
    run, notes, port = Recording(tmp_path, ["a"], 1).play(), Notes(), free_port()
    before = set(processes_below(os.getpid()))
    with page_beside(f"127.0.0.1:{port}", None, notes) as shown:
        shown.see(FolderKnown(run.path))
        assert ask(port) == "run"
        (page,) = set(processes_below(os.getpid())) - before
        os.kill(page, signal.SIGKILL)
        wait_until_gone(port)
        deadline = Deadline.after(WAIT_S)
        with caplog.at_level(logging.WARNING):
            while not caplog.records and deadline.left_s():
                shown.see(RunStarted("r", 0))
            shown.see(RunStarted("r", 1))

    assert notes.seen[-2:] == [RunStarted("r", 0), RunStarted("r", 1)]
    assert [r.getMessage() for r in caplog.records] == ["page.ended code=-9"]


def test_a_run_that_dies_leaves_no_page(tmp_path: Path) -> None:
    """However its coordinator ends, kill -9 included, nothing listens there afterwards."""
    run, port = Recording(tmp_path, ["a"], 1).play(), free_port()
    command = [sys.executable, "-c", PARENT, str(run.path), f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        assert ask(port) == "run"
        parent.kill()

    wait_until_gone(port)


def test_without_an_address_there_is_nothing(tmp_path: Path) -> None:
    """A run without `page` has the watcher that it had, and no other process."""
    notes = Notes()

    with page_beside(None, None, notes) as shown:
        assert shown is notes
