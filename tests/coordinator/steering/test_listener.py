"""A run's ear: who may speak to it, what it takes, and that callers cost the run nothing."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator.results.run_folder import SOCKET
from coordinator.results.run_lock import locked
from coordinator.steering import asking, listener
from coordinator.steering.asking import ask
from coordinator.steering.listener import Listener
from coordinator.steering.socket_path import socket_path
from coordinator.steering.wishes import Wish, encode
from edge_sdk.errors import ConfigError, EdgeError

STOP = Wish("stop", after_round=True)
SOON_S = 10.0


def call(folder: Path, said: bytes = b"") -> socket.socket:
    """Call a run as anybody can who may open its socket, and say something."""
    link = socket.socket(socket.AF_UNIX)
    with socket_path(folder) as path:
        link.connect(path)
    link.settimeout(SOON_S)
    if said:
        link.sendall(said)
    return link


def heard(link: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    found = b""
    while piece := link.recv(4096):
        found += piece
    return found


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run's folder that is held."""
    with locked(tmp_path):
        yield tmp_path


def test_a_wish_is_answered_when_the_run_has_ended(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks hears at once that it is known, and how the run has ended when it has."""
    monkeypatch.setattr(asking, "LETS_GO_S", 0.0)  # this process does not let go
    wishes: list[Wish] = []
    events: list[str] = []
    with Listener(held, lambda wish: wishes.append(wish)) as ear:

        def end() -> None:
            while not events:
                time.sleep(0.01)
            events.append("ending")
            ear.answer("stopped")

        thread = threading.Thread(target=end)
        thread.start()
        outcome = ask(held, STOP, lambda: events.append("taken"))
        thread.join()

    assert (wishes, events, outcome) == ([STOP], ["taken", "ending"], "stopped")
    assert not (held / SOCKET).exists()


def test_the_socket_is_its_owners_alone(held: Path) -> None:
    """Nobody but the owner of the run may open its socket, or look into its folder."""
    with Listener(held, lambda _: None):
        assert stat.S_IMODE((held / SOCKET).stat().st_mode) == 0o600
        assert stat.S_IMODE(held.stat().st_mode) == 0o700


def test_a_folder_may_lie_deep(tmp_path: Path) -> None:
    """A path far longer than that of a socket may be is spoken to like any other."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    wishes: list[Wish] = []

    with (
        locked(deep),
        Listener(deep, lambda wish: wishes.append(wish)),
        call(deep, encode(STOP)) as link,
    ):
        assert json.loads(link.recv(4096)) == {"asked": "stop"}

    assert wishes == [STOP]


def test_a_refusal_is_told(held: Path) -> None:
    """A run that does not do what is asked says why, and goes on."""
    with Listener(held, lambda _: "not here"), pytest.raises(ConfigError, match="not here"):
        ask(held, STOP, lambda: None)


def test_a_run_that_does_not_go_on_is_named(tmp_path: Path) -> None:
    """Where no process holds the run, one clear line says so at once."""
    with pytest.raises(ConfigError, match="does not go on now"):
        ask(tmp_path, STOP, lambda: None)


def test_who_holds_and_does_not_listen_is_named(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that holds the run and has no ear is named, with the way that is left."""
    monkeypatch.setattr(asking, "LISTENS_S", 0.0)

    with pytest.raises(EdgeError, match=f"process {os.getpid()} since .*SIGTERM pauses it"):
        ask(held, STOP, lambda: None)


def test_a_coordinator_that_dies_answers_nobody(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a run that ends in an error is told that there is no answer."""
    monkeypatch.setattr(asking, "LETS_GO_S", 0.0)
    ear = Listener(held, lambda _: None)
    ear.__enter__()

    with pytest.raises(EdgeError, match="without an answer"):
        ask(held, STOP, lambda: ear.__exit__(None, None, None))


def test_a_killed_process_leaves_nothing_in_the_way(held: Path) -> None:
    """A socket that a killed coordinator has left is replaced by that of the next one."""
    left = socket.socket(socket.AF_UNIX)
    with socket_path(held) as path:
        left.bind(path)
    left.close()

    with Listener(held, lambda _: None), call(held, encode(STOP)) as link:
        assert json.loads(link.recv(4096)) == {"asked": "stop"}


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n", b"\x00" * 5000, b"[" * 300, b'{"wish": 1}\n', encode(STOP)[:5]]
)
def test_nonsense_asks_for_nothing(
    held: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is said is refused or waited for in vain, and the next caller is heard."""
    monkeypatch.setattr(listener, "SAY_S", 0.2)
    wishes: list[Wish] = []

    with Listener(held, lambda wish: wishes.append(wish)):
        with call(held, said) as hostile:
            try:
                answer = heard(hostile)
            except ConnectionResetError:
                answer = b""
        assert answer == b"" or "refused" in json.loads(answer)
        assert wishes == []
        with call(held, encode(STOP)) as link:
            assert "asked" in json.loads(link.recv(4096))

    assert wishes == [STOP]


def test_callers_without_end_cost_next_to_nothing(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of silent callers keep few descriptors, little time, and are gone soon."""
    monkeypatch.setattr(listener, "SAY_S", 0.3)
    wishes: list[Wish] = []
    with Listener(held, lambda wish: wishes.append(wish)):
        before, links = len(os.listdir("/proc/self/fd")), []
        spent_s = time.process_time()
        for _ in range(100):
            links.append(call(held))
        kept = len(os.listdir("/proc/self/fd")) - before - len(links)
        spent_s = time.process_time() - spent_s
        until_s = time.monotonic() + SOON_S
        while True:
            with suppress(ConnectionError), call(held, encode(STOP)) as link:
                if link.recv(4096):
                    break
            assert time.monotonic() < until_s
        for link in links:
            link.close()

    assert wishes == [STOP]
    assert kept <= listener.MOST_CALLERS + 2  # one that is turned away, and this listing
    assert spent_s < 1.0
