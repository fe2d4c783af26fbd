"""The way to a coordinator, and everything that can stand in it; sockets and gateways are real."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import zmq

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.client.link_speed import LinkSpeed
from edge_sdk.doctor import link as links
from edge_sdk.doctor.link import Reached, Session
from edge_sdk.errors import PeerGone, RefusedError, RemoteProtocolError
from edge_sdk.protocol.messages import Stamp, Welcome
from edge_sdk.transport.handshake import Handshake, shake_hands
from edge_sdk.transport.keys import KeyPair, make_key_pair
from edge_sdk.transport.link import LinkConfig, package_version

HERE = "127.0.0.1"
PATIENCE_S = 10.0


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("tcp://10.0.0.1:7070", ("10.0.0.1", 7070)),
        ("tcp://coordinator.local:7070", ("coordinator.local", 7070)),
        ("tcp://[fe80::1]:7070", ("fe80::1", 7070)),
        ("tcp://host", None),
        ("http://host:1", None),
        ("tcp://host:70000", None),
        ("host:7070", None),
    ],
)
def test_addresses_are_read(address: str, found: tuple[str, int] | None) -> None:
    """Host and port, IPv6 in brackets; nothing of anything else."""
    assert links.parse_address(address) == found


def test_a_name_that_nobody_knows() -> None:
    """The line names the host; the cure depends on the kind of name."""

    def unknown(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    plain, where = links.check_name("tcp://board-7:7070", unknown)
    local, _ = links.check_name("tcp://board-7.local:7070", unknown)
    wrong, _ = links.check_name("board-7", unknown)

    assert (plain.status, plain.text) == ("failure", "board-7: Name or service not known")
    assert where is None
    assert "/etc/hosts" in plain.cure
    assert "libnss-mdns" in local.cure
    assert wrong.cure == "coordinator=tcp://HOST:7070"


def test_a_name_that_is_known() -> None:
    """What it stands for comes back; this machine's own name is resolved by the system."""
    finding, where = links.check_name("tcp://localhost:7070")

    assert finding.status == "ok"
    assert where is not None
    assert where[:2] == ("localhost", 7070)
    assert {"127.0.0.1", "::1"} & set(where[2])


def test_a_resolver_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the limit the check goes on without it."""
    over = threading.Event()
    monkeypatch.setattr(links, "NAME_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: over.wait(PATIENCE_S) and [])

    finding, _ = links.check_name("tcp://slow:7070")

    over.set()
    assert finding.status == "failure"
    assert "no answer within" in finding.text


# ---- reach ---------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens."""
    with socket.create_server((HERE, 0)) as made:
        yield made


def answering(listener: socket.socket, data: bytes, *, stays: bool = False) -> int:
    """Let *listener* greet one visitor with *data* and hang up, or stay; returns its port."""

    def serve() -> None:
        visitor, _ = listener.accept()
        with visitor:
            visitor.recv(links.GREETING_BYTES)
            visitor.sendall(data)
            while stays and visitor.recv(1024):
                pass

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "takes the connection and says nothing"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak ZeroMQ"),
        (b"SSH-2.0-OpenSSH_9.6\r\n".ljust(80, b"x"), "does not speak ZeroMQ"),
    ],
)
def test_another_program_behind_the_port(data: bytes, text: str, listener: socket.socket) -> None:
    """A tunnel without an end, a web server, an SSH server: told apart from a coordinator."""
    finding, found = links.check_reach([HERE], answering(listener, data))

    assert finding.status == "failure"
    assert text in finding.text
    assert found is not None


def test_a_silent_port_is_waited_for_a_moment(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that takes the connection and hangs does not hang the doctor."""
    monkeypatch.setattr(links, "GREETING_S", 0.1)

    finding, _ = links.check_reach([HERE], answering(listener, b"", stays=True))

    assert "says nothing" in finding.text


def test_zeromq_without_keys_is_no_coordinator() -> None:
    """Its greeting says how keys are exchanged: not at all."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port(f"tcp://{HERE}")

        finding, _ = links.check_reach([HERE], port)

    assert finding.status == "failure"
    assert "without keys (NULL)" in finding.text


@pytest.mark.parametrize(
    ("error", "text", "cure"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "no program listens", "serve"),
        (TimeoutError("timed out"), "a firewall", "ufw allow 7070/tcp"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "unreachable", "ip route"),
    ],
)
def test_no_connection_has_three_reasons(error: OSError, text: str, cure: str) -> None:
    """Nobody listens, nobody answers, no way there: each with what to do, of the last address."""
    asked = []

    def connect(address: str, _port: int) -> Reached:
        asked.append(address)
        raise error

    finding, found = links.check_reach(["10.0.0.1", "10.0.0.2"], 7070, connect)

    assert (finding.status, found, asked) == ("failure", None, ["10.0.0.1", "10.0.0.2"])
    assert text in finding.text
    assert finding.text.startswith("10.0.0.2 port 7070: ")
    assert cure in finding.cure


def test_a_closed_port_refuses(listener: socket.socket) -> None:
    """The system's own word for it, on a real port."""
    port = listener.getsockname()[1]
    listener.close()

    assert "no program listens" in links.check_reach([HERE], port)[0].text


@pytest.mark.parametrize(
    ("mtu", "status"), [("1500", "ok"), ("1000", "warning"), (None, "skipped")]
)
def test_the_interface_of_the_way(mtu: str | None, status: str, tmp_path: Path) -> None:
    """Found by our own end's address; too small a packet is a warning."""
    reached = Reached("10.0.0.1", "10.0.0.9", 0.001, 1448, b"")
    folder = tmp_path / "sys/class/net/wlan0"
    (folder / "wireless").mkdir(parents=True)
    (folder / "speed").write_text("-1\n")
    if mtu is not None:
        (folder / "mtu").write_text(f"{mtu}\n")

    finding = links.check_mtu(reached, tmp_path, lambda: {"lo": [HERE], "wlan0": ["10.0.0.9"]})

    assert finding.status == status
    if mtu is not None:
        assert finding.text.startswith(f"wlan0, Wi-Fi, MTU {mtu}, 1448 bytes in a packet")


# ---- handshake -----------------------------------------------------------------------------------


@pytest.fixture
def keys() -> dict[str, KeyPair]:
    """Pairs of a coordinator, a registered device, and a stranger."""
    return {name: make_key_pair() for name in ("coordinator", "device", "stranger")}


@pytest.fixture
def gateway(tmp_path: Path, keys: dict[str, KeyPair]) -> Iterator[ZmqGateway]:
    """A gateway that knows one device."""
    allowed = AllowList(tmp_path / "devices.json")
    allowed.register("board", keys["device"].public)
    config = GatewayConfig(address=f"tcp://{HERE}:*", keys=keys["coordinator"])
    with ZmqGateway(config, allowed) as made:
        yield made


def test_right_keys_are_told_from_two_kinds_of_wrong_ones(
    gateway: ZmqGateway, keys: dict[str, KeyPair]
) -> None:
    """All right; a key that is not registered; a server key that is not the coordinator's."""

    def shaken(server: str, device: str) -> Handshake:
        pair = keys[device]
        config = LinkConfig(address=gateway.address, server_key=keys[server].public, keys=pair)
        return shake_hands(config, PATIENCE_S)

    public = keys["stranger"].public
    fine = links.check_handshake(shaken("coordinator", "device"), public)
    unknown = links.check_handshake(shaken("coordinator", "stranger"), public)
    misled = links.check_handshake(shaken("stranger", "device"), public)

    assert [one.status for one in (fine, unknown, misled)] == ["ok", "failure", "failure"]
    assert f"client register NAME '{public}'" in unknown.cure
    assert "server_key is not its key" in misled.text
    assert gateway.devices() == []


@pytest.mark.parametrize(
    ("found", "status", "text"),
    [
        (Handshake(False, 300, 0, None), "failure", "status 300"),
        (Handshake(False, None, 0, None), "failure", "no end of it"),
        (Handshake(True, None, 0, None), "failure", "it hangs"),
    ],
)
def test_rarer_ends_of_a_handshake(found: Handshake, status: str, text: str) -> None:
    """No judgement, no end, no answer."""
    finding = links.check_handshake(found, "key")

    assert finding.status == status
    assert text in finding.text


# ---- session -------------------------------------------------------------------------------------


def welcome(sdk_version: str) -> Welcome:
    """The coordinator's greeting, of which only what matters here is filled in."""
    blank: dict[str, Any] = dict.fromkeys(
        (field.name for field in fields(Welcome) if field.default is MISSING), None
    )
    stamp = Stamp(run="run-1", device="board")
    return Welcome(**{**blank, "stamp": stamp, "protocol": 1, "sdk_version": sdk_version})


def test_versions_of_both_sides_are_compared() -> None:
    """Equal is fine; another one there is a warning that names both ways out."""
    speed, ours = LinkSpeed(0.01, 1e7, 2e7), package_version()

    same = links.check_session(Session(welcome(ours), speed, None), 1 << 20)
    other = links.check_session(Session(welcome("9.9"), speed, None), 1 << 20)

    assert [finding.status for finding in same] == ["ok", "ok"]
    assert same[1].text == "round trip 10.0 ms, 80.0 Mbit/s up, 160.0 Mbit/s down"
    assert other[0].status == "warning"
    assert other[0].cure == f"pip install 'edgesplit==9.9' here, or {ours} there"


def test_a_slow_link_wants_small_chunks() -> None:
    """Below 4 Mbit/s, unless they are small already."""
    found = Session(welcome(package_version()), LinkSpeed(0.1, 1e5, 1e6), None)

    assert links.check_session(found, 1 << 20)[1].cure == "chunk_bytes=262144"
    assert links.check_session(found, 1 << 18)[1].status == "ok"


@pytest.mark.parametrize(
    ("found", "statuses", "text"),
    [
        (Session(None, None, RefusedError("other model")), ["failure", "skipped"], "other model"),
        (Session(None, None, PeerGone("gone")), ["failure", "skipped"], "gone"),
        (Session(None, None, None), ["failure", "skipped"], "no welcome within"),
        (Session(welcome("1"), None, None), ["warning", "failure"], "large packets are lost"),
        (Session(welcome("1"), None, RemoteProtocolError("odd")), ["warning", "failure"], "odd"),
    ],
)
def test_a_session_that_comes_to_nothing(found: Session, statuses: list[str], text: str) -> None:
    """Refused, gone, no welcome, no end of measuring: each in words."""
    findings = links.check_session(found, 1 << 20)

    assert [finding.status for finding in findings] == statuses
    assert any(text in finding.text for finding in findings)
