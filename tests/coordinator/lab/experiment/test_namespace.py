"""A network namespace for each emulated board, with the kernel's own limits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from coordinator.lab.experiment.namespace import FOLDER, Namespace
from coordinator.lab.experiment.relay import LinkShape
from edge_sdk.errors import DeviceError

RATE = 1e6
SHAPE = LinkShape(up_bytes_per_s=RATE, down_bytes_per_s=2 * RATE)
CALL = "import socket; socket.create_connection(({!r}, {}), timeout={}).sendall(b'x' * {})"
SOON_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def rights() -> None:
    """Skip where there can be no namespaces."""
    try:
        Namespace(0).close()
    except DeviceError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture
def board() -> Iterator[Namespace]:
    """A board behind a link of 8 Mbit/s up and 16 down."""
    with Namespace(1, SHAPE) as namespace:
        yield namespace


class Sink:
    """Takes what comes to this machine."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_bytes = 0
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            while data := peer.recv(65536):
                self.num_bytes += len(data)

    def wait(self) -> int:
        """Wait until the other side has ended; returns what came."""
        self._thread.join(SOON_S)
        self._listener.close()
        return self.num_bytes


def send(board: Namespace, port: int, num_bytes: int, timeout_s: float = SOON_S) -> int:
    """Send from inside *board*; returns the sender's exit code."""
    words = [sys.executable, "-c", CALL.format(board.host, port, timeout_s, num_bytes)]
    done = subprocess.run([*board.enter, *words], stderr=subprocess.DEVNULL, check=False)
    return done.returncode


def rates(board: Namespace) -> list[float | None]:
    """Bytes a second that the kernel lets through, up and down."""
    found: list[float | None] = []
    for where, end in (("-n", board.name), f"es{os.getpid()}b1"), ((), f"es{os.getpid()}h1"):
        words = ["tc", *where, "-j", "qdisc", "show", "dev", end]
        (rules,) = json.loads(subprocess.check_output(words))
        found.append(rules.get("options", {}).get("rate"))
    return found


def test_a_board_reaches_the_coordinator_over_a_limited_link(board: Namespace) -> None:
    """All bytes arrive, the kernel has both rates, and the busy time is bytes over rate."""
    sink = Sink(board.host)

    assert send(board, sink.port, 200_000) == 0

    assert sink.wait() == 200_000
    assert rates(board) == [RATE, 2 * RATE]
    used = board.usage()
    assert 200_000 < used.bytes_up < 230_000  # with headers
    assert used.up_s == pytest.approx(used.bytes_up / RATE)
    assert used.down_s == pytest.approx(used.bytes_down / (2 * RATE))


def test_another_link_keeps_what_was_counted(board: Namespace) -> None:
    """Bytes of the former link count at its rate, later ones at the new one."""
    sink = Sink(board.host)
    send(board, sink.port, 100_000)
    sink.wait()
    before = board.usage()

    board.reshape(LinkShape(up_bytes_per_s=10 * RATE))
    again = Sink(board.host)
    send(board, again.port, 100_000)

    assert again.wait() == 100_000
    assert rates(board) == [10 * RATE, None]
    after = board.usage()
    assert after.up_s - before.up_s == pytest.approx(
        (after.bytes_up - before.bytes_up) / (10 * RATE)
    )
    assert after.down_s == before.down_s


def test_nothing_passes_a_cut_and_all_does_after_it(board: Namespace) -> None:
    """Until it is mended, or its time is over."""
    sink = Sink(board.host)
    board.cut()
    assert send(board, sink.port, 10, timeout_s=0.5) != 0
    board.mend()
    assert send(board, sink.port, 10) == 0
    assert sink.wait() == 10

    sink = Sink(board.host)
    board.cut(0.2)
    until = time.monotonic() + SOON_S
    while send(board, sink.port, 10, timeout_s=1.0) and time.monotonic() < until:
        pass
    assert sink.wait() == 10


def test_a_new_namespace_after_a_drop_works_as_the_old_one(board: Namespace) -> None:
    """Connections are forgotten, rates and counts are not."""
    sink = Sink(board.host)
    send(board, sink.port, 10_000)
    sink.wait()
    before = board.usage()

    board.drop()

    assert rates(board) == [RATE, 2 * RATE]
    assert board.usage().bytes_up >= before.bytes_up
    again = Sink(board.host)
    assert send(board, again.port, 10) == 0
    assert again.wait() == 10


def test_nothing_is_left(board: Namespace) -> None:
    """Neither the namespace nor our end of its link."""
    board.close()

    assert not (FOLDER / board.name).exists()
    links = subprocess.check_output(["ip", "-o", "link"], text=True)
    assert f"es{os.getpid()}h1" not in links


def test_what_a_killed_experiment_left_is_removed() -> None:
    """The next namespace sweeps those whose maker is gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = f"edgesplit-{gone.pid}-0"
    subprocess.run(["ip", "netns", "add", left], check=True)

    Namespace(2).close()

    assert not (FOLDER / left).exists()


def test_addresses_of_somebody_else_are_not_taken() -> None:
    """Two experiments whose numbers meet: the second one says so."""
    with Namespace(4) as board:
        address = f"{board.host}/32"
    subprocess.run(["ip", "addr", "add", address, "dev", "lo"], check=True)
    try:
        with pytest.raises(DeviceError, match="is taken"):
            Namespace(4)
    finally:
        subprocess.run(["ip", "addr", "del", address, "dev", "lo"], check=True)


def test_a_delay_works_or_says_what_is_missing() -> None:
    """With netem in the kernel it is there, without it the way out is named and nothing is left."""
    late, name, why = LinkShape(up_bytes_per_s=RATE, delay_s=0.01), f"edgesplit-{os.getpid()}-3", ""
    try:
        with Namespace(3, late):
            shown = subprocess.check_output(["tc", "-n", name, "qdisc", "show"], text=True)
    except DeviceError as error:
        why = str(error)

    if why:
        assert "netem" in why
    else:
        assert "netem" in shown
    assert not (FOLDER / name).exists()
