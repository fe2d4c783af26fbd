"""A hub on this machine: as much of its protocol as a push needs, large files included."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class FakeHub:
    """What was pushed."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Whether only its owner sees it, by repository."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content of what was committed, by path."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by their hash."""
    refuses: bool = False
    """Whether the token may not write."""


def answer(hub: FakeHub, path: str, body: bytes) -> Any:
    """What the hub says to a POST."""
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        hub.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
        return {"url": f"{hub.address}/{name}", "id": name, "name": name}
    if "/preupload/" in path:
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if "safetensors" in f["path"] else "regular" for f in files}
        told = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        return {"files": told}
    if path.endswith("/info/lfs/objects/batch"):
        found = [
            {**o, "actions": {"upload": {"href": f"{hub.address}/blob/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": found}
    assert "/commit/" in path, path
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            hub.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            hub.files[value["path"]] = hub.blobs[value["oid"]]
    repo = path.split("/commit/")[0].removeprefix("/api/models/")
    return {"commitUrl": f"{hub.address}/{repo}/commit/1", "commitOid": "1" * 40}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens on the loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # noqa: N802 - the library's name
            body = self._body()
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if hub.refuses or not known:
                self._reply(403, {"error": "this token may not write"})
            else:
                self._reply(200, answer(hub, self.path, body))

        def do_PUT(self) -> None:  # noqa: N802 - the library's name
            hub.blobs[self.path.rsplit("/", 1)[1]] = self._body()
            self._reply(200, {})

        def do_GET(self) -> None:  # noqa: N802 - the library's name
            self._reply(200, {"sha": "0" * 40, "siblings": [], "id": "me/x", "private": True})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
