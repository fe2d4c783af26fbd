"""The page beside a real run: what it shows meanwhile, and that the run is the same without it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from coordinator.page.beside import page_beside
from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import FolderKnown
from coordinator.results.run_folder import CONFIG
from coordinator.results.run_lock import locked
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.watchers import Watchers
from edge_sdk.config.describe import dump_config
from edge_sdk.deadline import Deadline
from edge_sdk.protocol.messages import StepReport
from tests.coordinator.page.browser import Tab, chromium
from tests.coordinator.page.served import served
from tests.e2e.cluster import Cluster, Serving, Trap, wait_all
from tests.e2e.programs import free_port

STEPS = 6
WAIT_S = 30.0


class Gate(Trap):
    """Lets steps of device a pass one by one, and shows everything to *shown* first."""

    def __init__(self, shown: Any, is_open: bool = False) -> None:
        super().__init__()
        self._shown, self._may_go = shown, threading.Semaphore(10**6 if is_open else 0)
        self.on_step = self._wait

    def see(self, event: RunEvent) -> None:
        """Let others see it, and then wait where it is a step."""
        self._shown.see(event)
        super().see(event)

    def _wait(self, device: str, _report: StepReport) -> None:
        if device == "a":
            assert self._may_go.acquire(timeout=WAIT_S), "nobody lets the step pass"

    def open(self, steps: int = 1) -> None:
        """Let so many steps pass."""
        self._may_go.release(steps)


@contextmanager
def held(serving: Serving) -> Iterator[Path]:
    """Give the run's folder what `serve` gives it, and hold it."""
    serving.folder.write_text(CONFIG, dump_config(serving.config))
    with locked(serving.folder.path):
        serving.trap.see(FolderKnown(serving.folder.path))
        yield serving.folder.path


def test_a_browser_sees_a_run_go_on(cluster: Cluster) -> None:
    """Devices, steps and the end of a real run appear by themselves, as they come."""
    gate = Gate(LiveFile(lambda: next(ticks)))
    ticks = iter(range(10**9))  # every step is written, as if each took a second
    with chromium() as browser:
        serving = cluster.serve(trap=gate)
        with held(serving) as folder, served(folder) as page:
            tab = Tab(browser)
            tab.page.goto(page.url)
            clients = [*cluster.start()]
            serving.start()
            tab.wait("document.querySelectorAll('.card[data-tone=training]').length > 0")
            for step in range(1, STEPS + 1):
                tab.wait(
                    "document.querySelector('#facts').innerText.includes(argument)",
                    f"step {step} of {STEPS}",
                )
                gate.open()
            serving.wait()
            wait_all(clients)
            tab.wait("document.querySelector('#events').innerText.includes('the run has ended')")

            assert tab.page.locator(".card").count() == 3
            tab.page.wait_for_selector("#curves .scatterlayer .trace")
            assert tab.errors == []
            assert tab.refused() == []


def test_hostile_browsers_change_nothing_of_a_run(cluster: Cluster) -> None:
    """With many that stall, babble or ask for nothing, its numbers are those without a page."""
    found = []
    for number in range(2):
        port = free_port()
        with ExitStack() as stack:
            shown: Any = Watchers()
            if number:
                shown = stack.enter_context(page_beside(f"127.0.0.1:{port}", None, Watchers()))
            gate = Gate(shown, is_open=True)
            serving = cluster.serve(cluster.config(name=f"run-{number}"), trap=gate)
            stack.enter_context(held(serving))
            if number:
                stack.enter_context(_hostile(port))
            clients = cluster.start()
            serving.start().wait()
            wait_all(clients)
            found.append(serving.metrics)

    assert found[0] == found[1]
    with pytest.raises(ConnectionRefusedError):  # it has ended with the run
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S).close()


@contextmanager
def _hostile(port: int) -> Iterator[None]:
    """Open connections that never read, never ask, or send no HTTP; the page is still there."""
    said = [
        b"",
        b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\xff" * 4000 + b"\r\n\r\n",
    ]
    with ExitStack() as stack:
        for number in range(90):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            line.sendall(said[number % 3])
        assert "run" in _asked(port)
        yield


def test_serve_has_a_page(files: Cluster, start: Any) -> None:
    """`page` of a config shows the run of `coordinator serve`, and ends with it, as by Ctrl-C."""
    port = free_port()
    more = f"page=127.0.0.1:{port}", "steps_per_round=400"
    coordinator = start("coordinator", "serve", "--config", "run.yaml", *more)
    coordinator.wait_for("listening at")
    for name in ("a", "b"):
        start("edge-sdk", "run", "--config", f"{name}.yaml")
    deadline, tones = Deadline.after(WAIT_S), set()
    while "training" not in tones and deadline.left_s():
        state = _asked(port)
        tones = {card["tone"] for name, card in state.items() if name.startswith("device:")}

    assert "training" in tones
    assert state["run"]["state"] == "running"
    coordinator.interrupt()
    assert coordinator.wait() == 130
    assert f"page: http://127.0.0.1:{port}/" in coordinator.text
    with pytest.raises(ConnectionRefusedError):
        _asked(port)


def _asked(port: int) -> dict[str, Any]:
    """Return the state that a page tells."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        line.request("GET", "/state")
        found: dict[str, Any] = json.loads(line.getresponse().read())["set"]
        return found
    finally:
        line.close()
