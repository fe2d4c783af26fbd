"""The page's own server in a thread, and a browser's part by hand."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.page.access import Access
from coordinator.page.listening import listen
from coordinator.page.runs import Runs
from coordinator.page.serving import PageApp, make_server
from edge_sdk.transport.addresses import WebAddress

WAIT_S = 20.0


@dataclass(frozen=True)
class Page:
    """A page that is served."""

    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        method: str = "GET",
        body: str | None = None,
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and text of an answer."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            line.request(method, path, body=body, headers=dict(headers or {}))
            answer = line.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, told, answer.read().decode("utf-8", "replace")
        finally:
            line.close()

    @contextmanager
    def stream(self, path: str = "/events") -> Iterator[Iterator[tuple[str, Any]]]:
        """Yield the events of a stream as they come: their names, and their data."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        line.request("GET", path)
        answer = line.getresponse()
        assert answer.status == 200
        try:
            yield _events(answer)
        finally:
            answer.close()
            line.close()


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    name = ""
    while line := answer.readline().decode():
        key, _, value = line.rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value) if value else None


@contextmanager
def served(
    folder: Path, token: str | None = None, look_s: float = 0.05, sock: socket.socket | None = None
) -> Iterator[Page]:
    """Serve the page of *folder* at any port of this machine."""
    sock = sock or listen(WebAddress("127.0.0.1", 0), "page")
    port = sock.getsockname()[1]
    app = PageApp(Runs(folder), Access(WebAddress("127.0.0.1", port), token), look_s)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield Page(port)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the page has not ended"
