"""The page over a real socket: what is answered, to whom, and what a slow browser costs."""

from __future__ import annotations

import gzip
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from coordinator.page import listening, serving
from coordinator.page.access import HEADERS
from coordinator.page.listening import listen, require_page
from coordinator.page.serving import FILES, PLOTLY
from coordinator.results.events.devices import DeviceLeft
from coordinator.results.events.run import RunFinished
from coordinator.results.lifecycle import COMPLETED
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import WebAddress
from tests.coordinator.page.recorded import Recording
from tests.coordinator.page.served import WAIT_S, Page, served

TOKEN = "a-token-of-twenty-four-letters"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A run of three devices that has ended."""
    return Recording(tmp_path_factory.mktemp("runs"), ["a", "b", "c"], 3).play()


@pytest.fixture(scope="module")
def page(recording: Recording) -> Iterator[Page]:
    """Its page, on this machine, without a token."""
    with served(recording.path) as page:
        yield page


def test_everything_of_a_run_is_told(page: Page) -> None:
    """The state holds a part for each card, and the whole course of the run."""
    status, _, text = page.ask("/state")

    parts = json.loads(text)["set"]
    assert status == 200
    assert parts["run"]["state"] == "complete"
    assert parts["model"]["blocks"] == 16
    assert [name for name in parts if name.startswith("device:")] == [
        "device:a",
        "device:b",
        "device:c",
    ]
    assert [point["round"] for point in parts["curves"]["points"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("path", ["/", "/login", "/state", "/runs", "/static/page.js", "/nothing"])
def test_no_answer_lets_a_browser_run_anything_else(page: Page, path: str) -> None:
    """Scripts, styles and connections are those of the page itself, nothing inline; no frames."""
    _, headers, _ = page.ask(path)

    policy = headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert {name: headers[name] for name in HEADERS if name != "cache-control"} == {
        name: value for name, value in HEADERS.items() if name != "cache-control"
    }


def test_its_files_hold_nothing_inline_and_fetch_nothing_elsewhere(page: Page) -> None:
    """No inline script, style or handler, no address of another site, and no HTML from text."""
    files = {name: page.ask(f"/static/{name}")[2] for name in FILES}
    files |= {"index": page.ask("/")[2], "login": page.ask("/login")[2]}

    for name, text in files.items():
        assert text.isascii(), name
        for forbidden in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "//cdn"):
            assert forbidden not in text, name
        assert "https://" not in text, name
        assert " style=" not in text, name
        assert "<style" not in text, name
        assert " onclick=" not in text, name


def test_plotly_comes_from_its_package(page: Page) -> None:
    """What is served is what the installed package ships, packed, and kept by the browser."""
    line = http.client.HTTPConnection("127.0.0.1", page.port, timeout=WAIT_S)
    line.request("GET", f"/static/{PLOTLY}")
    answer = line.getresponse()
    body = gzip.decompress(answer.read())
    line.close()

    import plotly

    shipped = Path(plotly.__file__).parent / "package_data" / PLOTLY
    assert body == shipped.read_bytes()
    assert answer.headers["cache-control"] == "private, max-age=86400"


@pytest.mark.parametrize(
    "path",
    ["/static/../serving.py", "/static/%2e%2e/serving.py", "/static/events.jsonl", "/state?run=.."],
)
def test_no_other_file_can_be_had(page: Page, path: str) -> None:
    """Files are looked up in a list, runs among those that are there."""
    assert page.ask(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/state", "/events", "/runs"])
def test_nothing_can_be_changed(page: Page, path: str, method: str) -> None:
    """A watcher only: whatever else is asked is not there."""
    assert page.ask(path, method=method)[0] == 405


def test_another_site_s_name_leads_nowhere(page: Page) -> None:
    """A page elsewhere whose name points to this machine gets nothing, as DNS rebinding would."""
    assert page.ask("/state", {"Host": f"evil.example:{page.port}"})[0] == 421
    assert page.ask("/state", {"Host": f"localhost:{page.port}"})[0] == 200


def test_a_token_opens_the_page(recording: Recording) -> None:
    """Without it only the form and its looks are shown; with it a cookie stands in for it."""
    with served(recording.path, TOKEN) as page:
        assert page.ask("/")[:1] == (303,)
        assert [page.ask(path)[0] for path in ("/state", "/events", "/runs")] == [401, 401, 401]
        assert page.ask("/login", method="POST", body="token=wrong")[0] == 403
        status, headers, _ = page.ask("/login", method="POST", body=f"token={TOKEN}")
        cookie = headers["set-cookie"]

        assert status == 303
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert TOKEN not in cookie
        assert page.ask("/state", {"Cookie": cookie.partition(";")[0]})[0] == 200
        assert page.ask("/state", {"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert page.ask("/state", {"Authorization": f"Bearer {TOKEN}x"})[0] == 401


def test_only_what_has_changed_is_sent(tmp_path: Path) -> None:
    """A stream begins with everything; later an event brings its own parts and no others."""
    run = Recording(tmp_path, ["a", "b"], 2).play(ends=False)
    with served(run.path) as page, page.stream() as events:
        _, first = next(events)
        run.watcher.see(DeviceLeft("b", "its battery is empty"))
        _, later = next(events)

    assert {"run", "device:a", "device:b", "curves", "plan", "importance"} <= first["set"].keys()
    assert "curves" not in later["set"]
    assert "plan" not in later["set"]
    assert any("battery" in row["text"] for row in later["set"]["events:0"])


def test_the_end_of_the_page_tells_the_last_of_the_run(tmp_path: Path) -> None:
    """What was written until the page ends is sent, and then that it ends."""
    run, found = Recording(tmp_path, ["a"], 1).play(ends=False), queue.SimpleQueue[Any]()
    with served(run.path, look_s=60.0) as page:
        reader = threading.Thread(target=_read_all, args=(page, found))
        reader.start()
        first = found.get(timeout=WAIT_S)
        run.watcher.see(RunFinished(COMPLETED))
    reader.join(WAIT_S)

    assert first[1]["set"]["run"]["state"] != "complete"
    assert found.get(timeout=0)[1]["set"]["run"]["state"] == "complete"
    assert found.get(timeout=0) == ("end", None)


def _read_all(page: Page, found: queue.SimpleQueue[Any]) -> None:
    with page.stream() as events:
        for event in events:
            found.put(event)


def test_too_many_are_told_to_come_later(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many may look at once; the next one is refused, and let in when another has gone."""
    monkeypatch.setattr(serving, "MOST_VIEWERS", 1)
    with served(recording.path) as page:
        with page.stream() as events:
            next(events)
            assert page.ask("/events")[0] == 503
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            line = socket.create_connection(("127.0.0.1", page.port), timeout=WAIT_S)
            with line:
                line.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if b" 200 " in line.recv(64):
                    return
            time.sleep(0.05)
        pytest.fail("nobody is let in any more")


def test_a_browser_that_takes_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is queued for it, others see the page meanwhile, and its connection is ended."""
    monkeypatch.setattr(serving, "STALL_S", 1.0)
    run = Recording(tmp_path, [f"d{n}" for n in range(120)], 2).play(ends=False)
    sock = listen(WebAddress("127.0.0.1", 0), "page")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with served(run.path, sock=sock) as page:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(WAIT_S)
        slow.connect(("127.0.0.1", page.port))
        slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with page.stream() as events:
            next(events)
            for number in range(30):
                run.watcher.see(DeviceLeft("d1", f"trouble {number}"))
            assert next(events)[1]["set"]
        time.sleep(1.5)  # longer than it may take nothing
        with slow:
            taken = _all_of(slow)
        whole = len(page.ask("/state")[2])

    assert taken < whole


def _all_of(line: socket.socket) -> int:
    """Return how many bytes come until the other side ends the connection."""
    taken = 0
    with suppress(ConnectionResetError):
        while piece := line.recv(65536):
            taken += len(piece)
    return taken


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: local"])
def test_who_asks_for_nothing_is_cut_off(
    page: Page, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """A connection that brings no whole request is ended after a while."""
    monkeypatch.setattr(serving, "IDLE_S", 0.3)
    with socket.create_connection(("127.0.0.1", page.port), timeout=WAIT_S) as line:
        line.sendall(said)
        assert _all_of(line) == 0


def test_an_address_that_is_taken_is_said(page: Page) -> None:
    """One clear line, before a run begins."""
    with pytest.raises(ConfigError, match=r"page: cannot listen at 127\.0\.0\.1"):
        listen(WebAddress("127.0.0.1", page.port), "page")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what to install."""
    monkeypatch.setattr(listening, "NEEDS", ("starlette", "no_such_package"))

    with pytest.raises(ConfigError, match=r"no_such_package missing.*edgesplit\[page\]"):
        require_page("page")
