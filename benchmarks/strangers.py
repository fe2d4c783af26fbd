"""Strangers at the coordinator's port: what they cost a run of three honest devices.

    python benchmarks/strangers.py [--kinds silent garbage ...] [--repeats 3] [--window_s 4]

Coordinator and devices are the real commands, each with one thread, over loopback with encryption,
in one run that does not end. Windows without strangers and windows with strangers of one kind take
turns; the pace of a window is the number of rounds that end in it a second, and counts beside the
window without strangers just before. Strangers come from 250 addresses; their process gets only the
CPU time that nobody else wants, because it is another machine's. The number is the median of the
repeats; memory and descriptors are the most that was seen. About four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
import zmq
from report import header, save, table
from soak_fleet import SoakFleet

SPLITS = (2, 3, 4)
MIB = 2**20
LOOK_S = 0.02
FIRST_S = 120.0
# What the issue of many strangers is about: so many a minute.
PER_MINUTE = 2000
HELD = 500
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL = GREETING.replace(b"CURVE", b"NULL\0")
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
HALF = b"\x06" + struct.pack(">Q", MIB)


# ---- strangers, in a process of their own ----


def dial(port: int) -> socket.socket:
    """Connect from one of 250 addresses."""
    here = (f"127.0.1.{random.randrange(1, 251)}", 0)
    return socket.create_connection(("127.0.0.1", port), 5.0, here)


def paced(port: int, until_s: float, words: bytes) -> int:
    """Connect `PER_MINUTE` times a minute, say *words*, and stay until one is thrown out."""
    held: list[socket.socket] = []
    count, began = 0, time.monotonic()
    while time.monotonic() < until_s:
        if count < (time.monotonic() - began) * PER_MINUTE / 60.0:
            with suppress(OSError):
                held.append(dial(port))
                held[-1].sendall(words)
            count += 1
            if len(held) > HELD:
                held.pop(0).close()
        else:
            time.sleep(0.005)
    return count


def wrong_keys(port: int, until_s: float) -> int:
    """Shake hands with a key of nobody's, `PER_MINUTE` times a minute."""
    server = Path(os.environ["STRANGERS_SERVER_KEY"]).read_bytes().strip()
    context, held = zmq.Context(), []
    context.max_sockets = 2 * HELD
    count, began = 0, time.monotonic()
    while time.monotonic() < until_s:
        if count < (time.monotonic() - began) * PER_MINUTE / 60.0:
            sock = context.socket(zmq.DEALER)
            sock.linger = 0
            sock.curve_serverkey = server
            sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
            sock.connect(f"tcp://127.0.1.{random.randrange(1, 251)}:0;127.0.0.1:{port}")
            held.append(sock)
            count += 1
            if len(held) > 100:
                held.pop(0).close()
        else:
            time.sleep(0.005)
    context.destroy(0)
    return count


def storm(port: int, until_s: float) -> int:
    """Connect and leave, as fast as can be."""
    count = 0
    while time.monotonic() < until_s:
        with suppress(OSError):
            dial(port).close()
            count += 1
    return count


def held_open(port: int, until_s: float, words: bytes, more: bytes) -> int:
    """Keep `HELD` connections that have said *words* and go on with *more*; replace those lost."""
    held: list[tuple[socket.socket, int]] = []
    count = 0
    while time.monotonic() < until_s:
        while len(held) < HELD and time.monotonic() < until_s:
            with suppress(OSError):
                sock = dial(port)
                sock.sendall(words)
                sock.setblocking(False)
                held.append((sock, 0))
            count += 1
        held = [(sock, at) for sock, before in held if (at := go_on(sock, more, before)) >= 0]
        time.sleep(0.01)
    return count


def go_on(sock: socket.socket, more: bytes, at: int) -> int:
    """Send some of *more* from *at*; return where it stands, -1 if nobody is there any more."""
    try:
        if at < len(more):
            at += sock.send(more[at : at + 65536])
        if not sock.recv(4096):
            return -1
    except BlockingIOError:
        return at
    except OSError:
        return -1
    return at


KINDS: dict[str, tuple[str, Callable[[int, float], int]]] = {
    "silent": ("say nothing, 2,000 a minute", lambda p, u: paced(p, u, b"")),
    "garbage": ("garbage, 2,000 a minute", lambda p, u: paced(p, u, bytes(range(256)) * 16)),
    "null": ("ZeroMQ without keys, 2,000 a minute", lambda p, u: paced(p, u, NULL + READY)),
    "keys": ("keys of nobody's, 2,000 a minute", wrong_keys),
    "storm": ("connect and leave, as fast as can be", storm),
    "half open": ("500 handshakes held half-way", lambda p, u: held_open(p, u, GREETING, b"")),
    "half sent": (
        "500 first commands of 1 MiB, all but their end",
        lambda p, u: held_open(p, u, GREETING + HALF, bytes(MIB - 1000)),
    ),
}


def attack(kind: str, port: int, seconds: float) -> None:
    """Be strangers; print how many connections were tried."""
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print(KINDS[kind][1](port, time.monotonic() + seconds))


# ---- the run ----


class Watch(threading.Thread):
    """The most memory and descriptors that a process has had."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.most_bytes = self.most_descriptors = 0

    def run(self) -> None:
        """Look until the process ends."""
        with suppress(psutil.Error):
            while True:
                self.most_bytes = max(self.most_bytes, self.process.memory_info().rss)
                self.most_descriptors = max(self.most_descriptors, self.process.num_fds())
                time.sleep(LOOK_S)

    def begin(self) -> None:
        """Forget what was before."""
        self.most_bytes = self.most_descriptors = 0


class Run:
    """The honest run, and its pace."""

    def __init__(self, folder: Path) -> None:
        self.fleet = SoakFleet(
            folder / "fleet",
            folder / "cache",
            SPLITS,
            has_relays=False,
            rounds=1_000_000,
            steps_per_round=2,
            save_total_limit=1,
            patience_s=60.0,
        )
        self.coordinator = self.fleet.serve()
        self.fleet.start()
        self.fleet.wait_until(lambda: self.rounds() > 5, FIRST_S)
        self.watch = Watch(self.coordinator.pid)
        self.watch.start()

    def rounds(self) -> int:
        """Return how many rounds have ended."""
        path = self.fleet.path / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def pace(self, seconds: float) -> float:
        """Return rounds a second, from the end of one to the end of another."""
        first_s, first = self._next()
        deadline = first_s + seconds
        last_s, last = first_s, first
        while last_s < deadline:
            last_s, last = self._next()
        return (last - first) / (last_s - first_s)

    def _next(self) -> tuple[float, int]:
        before = self.rounds()
        self.fleet.wait_until(lambda: self.rounds() > before or self.fleet.is_over(), FIRST_S)
        if self.fleet.is_over():
            raise SystemExit(f"the coordinator has ended: {self.coordinator.text[-2000:]}")
        return time.monotonic(), self.rounds()

    def log_bytes(self) -> int:
        """Return the size of what the coordinator has said, and of its events."""
        return self.coordinator.log.stat().st_size + sum(
            path.stat().st_size for path in self.fleet.path.glob("events.jsonl")
        )

    def under(self, kind: str, seconds: float) -> dict[str, float]:
        """Let strangers come for one window."""
        server = self.fleet.folder / "coordinator.key.pub"
        self.watch.begin()
        said = self.log_bytes()
        before = self.pace(seconds)
        quiet, fds = self.watch.most_bytes, self.watch.most_descriptors
        self.watch.begin()
        command = [sys.executable, __file__, "--attack", kind, "--port", str(self.fleet.port)]
        strangers = subprocess.Popen(
            [*command, "--window_s", str(seconds + 2.0)],
            env={**os.environ, "STRANGERS_SERVER_KEY": str(server)},
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(1.0)  # it imports
        pace = self.pace(seconds)
        out, _ = strangers.communicate()
        return {
            "pace": pace / before,
            "quiet": before,
            "mib": (self.watch.most_bytes - quiet) / MIB,
            "descriptors": self.watch.most_descriptors - fds,
            "log": (self.log_bytes() - said) / 1024.0,
            "connections": int(out or 0) / (seconds + 2.0) * 60.0,
        }


def main() -> None:
    """Run all kinds in turn; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window_s", type=float, default=4.0)
    parser.add_argument("--attack", choices=list(KINDS), default="", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        attack(options.attack, options.port, options.window_s)
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.kinds}
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name))
        try:
            for _ in range(options.repeats):
                for kind, windows in found.items():
                    windows.append(run.under(kind, options.window_s))
                    print(kind, json.dumps(windows[-1]), flush=True)
        finally:
            run.fleet.end()
    rows = [
        [
            KINDS[kind][0],
            f"{median(w['connections'] for w in windows):.0f}",
            f"{median(w['pace'] for w in windows):.2f}",
            f"{min(w['pace'] for w in windows):.2f}",
            f"{max(w['mib'] for w in windows):+.0f}",
            f"{max(w['descriptors'] for w in windows):+.0f}",
            f"{max(w['log'] for w in windows):.1f}",
        ]
        for kind, windows in found.items()
    ]
    heads = ["strangers", "a minute", "pace", "least", "MiB", "descriptors", "kB of log"]
    quiet = median(w["quiet"] for windows in found.values() for w in windows)
    notes = (
        f"Pace: rounds a second beside the window just before, without strangers (median "
        f"{quiet:.1f} rounds a second); median and least of {options.repeats}. The rest: the most. "
        "A kB of log and events or so are the run's own."
    )
    print(
        save(
            "strangers",
            "\n\n".join([header(__doc__.splitlines()[0], options), notes, table(heads, rows)]),
        )
    )


if __name__ == "__main__":
    main()
