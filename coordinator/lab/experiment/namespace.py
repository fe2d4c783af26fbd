"""A board's own network: a namespace of the kernel, behind a link that `tc` shapes. As root.

Takes the place of a `Relay`. Nothing of ours is between board and coordinator, so that the kernel's
own TCP meets rate, queue and losses. Delays need the kernel's netem.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil

from coordinator.lab.experiment.relay import LinkShape, LinkUsage
from edge_sdk.errors import DeviceError

# Each board has four addresses in a network whose third byte depends on the process.
NETWORK, BOARDS, EXPERIMENTS = "10.213", 64, 256
FOLDER, PREFIX = Path("/run/netns"), "edgesplit-"
# What a link carries at once after it was idle, and what may wait for it; more packets are lost.
BURST_S, LEAST_BURST_BYTES = 0.004, 16 * 1024
QUEUE_S, LEAST_QUEUE_PACKETS = 0.2, 64
PACKET_BYTES = 1500
# Rate of a link without a limit: with a rate, netem keeps packets in order, whatever their delay.
UNLIMITED_BYTES_PER_S = 1.25e9
TOOL_S = 30.0


class Namespace(AbstractContextManager["Namespace"]):
    """The network of one board. Raises DeviceError without the rights or tools to make it.

    Args:
        number: Number of the board on this machine, from 0.
        shape: How its link behaves.
    """

    def __init__(self, number: int, shape: LinkShape | None = None) -> None:
        self._shape = shape or LinkShape()
        if number >= BOARDS:
            raise DeviceError(f"there can be {BOARDS} of them")
        self.name = f"{PREFIX}{os.getpid()}-{number}"
        self._near, self._far = (f"es{os.getpid()}{end}{number}" for end in "hb")
        network = f"{NETWORK}.{os.getpid() % EXPERIMENTS}"
        self.host = f"{network}.{4 * number + 1}"
        """Address of this machine as the board sees it."""
        self._board = f"{network}.{4 * number + 2}"
        self.port = 0
        """Port of the coordinator."""
        self.enter = ("nsenter", f"--net={FOLDER / self.name}")
        """Words of a command line that precede a program that is to run there."""
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._cuts = 0
        self._before = (0, 0, 0.0, 0.0)
        """Bytes and busy seconds, up and down, of the links that this one was before."""
        self._then = (0, 0)
        """The kernel's counters when it became the link that it is now."""
        _sweep()
        try:
            self._make()
        except DeviceError:
            self.close()
            raise

    def _make(self) -> None:
        if f" {self.host}/" in _run("ip", "-o", "-4", "addr"):
            raise DeviceError(f"{self.host} is taken, by another experiment perhaps")
        _run("ip", "netns", "add", self.name)
        pair = ("type", "veth", "peer", "name", self._far, "netns", self.name)
        _run("ip", "link", "add", self._near, *pair)
        _run("ip", "addr", "add", f"{self.host}/30", "dev", self._near)
        _run("ip", "-n", self.name, "addr", "add", f"{self._board}/30", "dev", self._far)
        for inside, end in ((False, self._near), (True, self._far), (True, "lo")):
            _run("ip", *(("-n", self.name) if inside else ()), "link", "set", end, "up")
        self._limit()

    def _limit(self) -> None:
        shape = self._shape
        late = (shape.delay_s, shape.jitter_s)
        _limit((), self._near, shape.down_bytes_per_s, *late)
        _limit(("-n", self.name), self._far, shape.up_bytes_per_s, *late)

    # ---- the same as in a relay ----

    def aim(self, _host: str, port: int) -> None:
        """Note that the coordinator listens at *port*, at every address of this machine."""
        self.port = port

    def reshape(self, shape: LinkShape) -> None:
        """Become another link; what waits for the old one is lost."""
        with self._lock:
            self._settle()
            self._shape = shape
            self._limit()

    def cut(self, seconds: float | None = None) -> None:
        """Let nothing pass for *seconds*, or until `mend`; neither side is told."""
        with self._lock:
            self._cuts += 1
            _run("ip", "link", "set", self._near, "down")
            if seconds is not None:
                timer = threading.Timer(seconds, self._end_cut)
                timer.daemon = True
                timer.start()
                self._timers.append(timer)

    def _end_cut(self) -> None:
        with self._lock:
            self._cuts = max(0, self._cuts - 1)
            if not self._cuts:
                _call("ip", "link", "set", self._near, "up")  # unless it was closed meanwhile

    def mend(self) -> None:
        """End all cuts."""
        with self._lock:
            self._stop_timers()
            self._cuts = 0
            _run("ip", "link", "set", self._near, "up")

    def drop(self) -> None:
        """Forget all connections: a new namespace knows of none."""
        with self._lock:
            self._settle()
            self._remove()
            self._make()
            self._then = (0, 0)
            if self._cuts:
                _run("ip", "link", "set", self._near, "down")

    def usage(self) -> LinkUsage:
        """Return what has gone through since the start, headers of packets included."""
        with self._lock:
            up, down, up_s, down_s = self._totals()
        return LinkUsage(up, down, up_s, down_s, 0)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove it; programs in it are cut off."""
        with self._lock:
            self._stop_timers()
            self._remove()

    # ---- inside ----

    def _totals(self) -> tuple[int, int, float, float]:
        up, down = (now - then for now, then in zip(self._counters(), self._then, strict=True))
        shape, before = self._shape, self._before
        return (
            before[0] + up,
            before[1] + down,
            before[2] + up / shape.up_bytes_per_s,
            before[3] + down / shape.down_bytes_per_s,
        )

    def _settle(self) -> None:
        self._before, self._then = self._totals(), self._counters()

    def _counters(self) -> tuple[int, int]:
        """Return the bytes from and to the board, as our end of its link counts them."""
        folder = Path("/sys/class/net") / self._near / "statistics"
        try:
            up, down = (int((folder / f"{way}_bytes").read_text()) for way in ("rx", "tx"))
        except (OSError, ValueError):
            return self._then
        return up, down

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _remove(self) -> None:
        """Remove it at once: without its link gone, it would stay as long as its connections do."""
        try:
            _call("ip", "link", "del", self._near)
        finally:
            _call("ip", "netns", "del", self.name)


def _sweep() -> None:
    """Remove what an experiment that was killed has left."""
    for left in FOLDER.glob(f"{PREFIX}*-*"):
        pid, _, number = left.name.removeprefix(PREFIX).partition("-")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _call("ip", "link", "del", f"es{pid}h{number}")
            _call("ip", "netns", "del", left.name)


def _limit(where: Sequence[str], device: str, rate: float, delay_s: float, jitter_s: float) -> None:
    """Shape what leaves *device*."""
    tc = ("tc", *where, "qdisc")
    _call(*tc, "del", "dev", device, "root")
    if delay_s or jitter_s:
        _add(tc, device, _late(min(rate, UNLIMITED_BYTES_PER_S), delay_s, jitter_s))
    elif math.isfinite(rate):
        burst = str(max(LEAST_BURST_BYTES, int(rate * BURST_S)))
        queue = ("latency", f"{QUEUE_S * 1e3:.0f}ms")
        _add(tc, device, ("tbf", "rate", _bits(rate), "burst", burst, *queue))


def _add(tc: Sequence[str], device: str, shape: Sequence[str]) -> None:
    try:
        _run(*tc, "add", "dev", device, "root", *shape)
    except DeviceError as error:
        if shape[0] != "netem":
            raise
        raise DeviceError(
            f"{error}; a delay needs the kernel's netem: use links without rtt_ms and jitter_ms"
        ) from error


def _late(rate: float, delay_s: float, jitter_s: float) -> tuple[str, ...]:
    """Return words for netem, whose jitter goes both ways while ours only adds delay."""
    late = (f"{(delay_s + jitter_s / 2) * 1e6:.0f}us", f"{jitter_s / 2 * 1e6:.0f}us")
    waiting = rate * (QUEUE_S + delay_s + jitter_s) / PACKET_BYTES  # what is under way included
    most = str(max(LEAST_QUEUE_PACKETS, round(waiting)))
    return ("netem", "limit", most, "delay", *late, "rate", _bits(rate))


def _bits(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s:.0f}bit"


def _run(*words: str) -> str:
    """Return what a tool says; raise DeviceError if it fails."""
    done = _call(*words)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[0] if lines else f"exit code {done.returncode}"
        raise DeviceError(f"{' '.join(words)}: {why.removesuffix('.')}")
    return done.stdout


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=TOOL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"{words[0]} cannot be used: {error}") from error
