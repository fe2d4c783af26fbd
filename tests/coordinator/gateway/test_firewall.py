"""The table of docs/operations.md for nftables: the kernel takes it, and it does what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PORT = 7070
BURST = 64


def recipe() -> str:
    """Return the table that the documentation shows."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [found] = re.findall(r"```nft\n(.*?)```", page, re.DOTALL)
    return str(found)


def why_not() -> str:
    """Return why there can be no network of our own; empty if there can."""
    if shutil.which("nft") is None:
        return "nft is not installed"
    made = subprocess.run(["unshare", "-n", "nft", "list", "ruleset"], capture_output=True)
    return "" if made.returncode == 0 else "no network of our own may be made"


needs_network = pytest.mark.skipif(bool(why_not()), reason=why_not() or "")


@needs_network
def test_an_address_may_dial_so_often_and_others_are_not_hurt(tmp_path: Path) -> None:
    """The first 64 connections of an address get through, then few; another address has its own."""
    (tmp_path / "edgesplit.nft").write_text(recipe(), encoding="utf-8")

    done = subprocess.run(
        ["unshare", "-n", sys.executable, __file__, str(tmp_path / "edgesplit.nft")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert BURST <= found["stranger"] <= BURST + 16
    assert found["device"] == 4
    assert found["is_alive"]


def main() -> None:
    """Dial from two addresses in a network that has nothing but itself; print what got through."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for _ in range(2):  # loaded again, it replaces itself
        subprocess.run(["nft", "-f", sys.argv[1]], check=True)
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", PORT), backlog=256))
        first = stack.enter_context(dial("127.0.0.2"))
        served, _ = server.accept()
        counts = {"stranger": 1, "device": 0}
        for name, source, tries in (("stranger", "127.0.0.2", 80), ("device", "127.0.0.3", 4)):
            for _ in range(tries):
                try:
                    stack.enter_context(dial(source))
                    counts[name] += 1
                except OSError:
                    pass
        first.sendall(b"x")
        json.dump({**counts, "is_alive": served.recv(1) == b"x"}, sys.stdout)


def dial(source: str) -> socket.socket:
    """Connect from *source*; a packet that is dropped is not waited for."""
    return socket.create_connection(("127.0.0.1", PORT), 0.1, (source, 0))


if __name__ == "__main__":
    main()
