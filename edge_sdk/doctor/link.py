"""Checks of the way to the coordinator: name, connection, interface, keys; on request, a session.

While a device's key has a session a second one is refused, and a device that starts meanwhile would
be the second, so only `check_session` opens one.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import psutil

from edge_sdk.client.incoming import Inbox, RunEnded, Stopped
from edge_sdk.client.link_speed import LinkSpeed, probe
from edge_sdk.client.states import State
from edge_sdk.doctor.finding import Finding, failure, ok, skipped, warning
from edge_sdk.errors import EdgeError, PeerGone, RefusedError, one_line
from edge_sdk.protocol.codecs import float_codecs
from edge_sdk.protocol.messages import PROTOCOL_VERSION, Goodbye, Hello, Stamp, Welcome
from edge_sdk.transport.addresses import parse_address
from edge_sdk.transport.handshake import Handshake
from edge_sdk.transport.link import LinkConfig, package_version
from edge_sdk.transport.zmq_link import ZmqLink
from profiler.sensors.kernel_files import read_number, read_text
from profiler.sensors.sources import ROOT

NAME_S, CONNECT_S, GREETING_S, HANDSHAKE_S, SESSION_S = 5.0, 5.0, 3.0, 5.0, 20.0
# ZeroMQ greets with its signature, its version and how keys are exchanged. We say the first two: at
# the third a side that wants another exchange would hang up before it has told its own.
GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"
# What every network must carry (IPv6); tunnels below it break connections in odd ways.
LEAST_MTU = 1280
# Below 4 Mbit/s a chunk of a MiB stands in the way of heartbeats for too long.
SLOW_BYTES_PER_S, SMALL_CHUNK_BYTES = 500_000, 256 * 1024
FAREWELL_S = 1.0

Resolver = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host*.

    Raises:
        OSError: there is none, or no answer came in time.
    """
    answers: SimpleQueue[list[str] | OSError] = SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(one[4][0]) for one in found)))
        except OSError as error:
            answers.put(error)
        except UnicodeError:  # an empty or overlong label
            answers.put(OSError(errno.EINVAL, "is no name of a machine"))

    # A thread of its own, because the resolver of the system knows no time limit.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=NAME_S)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {NAME_S:.0f} s") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def check_name(
    coordinator: str, resolver: Resolver = resolve
) -> tuple[Finding, tuple[str, int, list[str]] | None]:
    """Check whether the coordinator's name means an address; also returns host, port, addresses."""
    where = parse_address(coordinator)
    if where is None:
        text = f"coordinator is {coordinator!r}, not tcp://HOST:PORT"
        return failure("name", text, "coordinator=tcp://HOST:7070"), None
    host, port = where
    try:
        found = resolver(host, port)
    except OSError as error:
        cure = f"echo 'IP {host}' | sudo tee -a /etc/hosts, or coordinator=tcp://IP:{port}"
        if host.endswith(".local"):
            cure = f"sudo apt install libnss-mdns, or coordinator=tcp://IP:{port}"
        return failure("name", f"{host}: {error.strerror or error}", cure), None
    text = f"{host} is {', '.join(found)}" if found != [host] else f"{host} is an address"
    return ok("name", text), (host, port, found)


class Reached(NamedTuple):
    """A connection that came about."""

    address: str
    local: str
    """Our own end's address."""
    seconds: float
    """Time until it stood: one round trip."""
    segment_bytes: int
    """Most that one packet carries."""
    greeting: bytes
    """What the other side says first; ZeroMQ's greeting has 64 bytes."""


def reach(address: str, port: int) -> Reached:
    """Connect to *address*, exchange greetings, and leave.

    Raises:
        OSError: there is no connection.
    """
    began = time.perf_counter()
    with socket.create_connection((address, port), timeout=CONNECT_S) as link:
        seconds = time.perf_counter() - began
        link.settimeout(GREETING_S)
        segment = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        greeting = b""
        with suppress(OSError):  # silence is an answer as well
            link.sendall(GREETING)
            while len(greeting) < GREETING_BYTES:
                more = link.recv(GREETING_BYTES - len(greeting))
                if not more:
                    break
                greeting += more
        return Reached(address, str(link.getsockname()[0]), seconds, segment, greeting)


def check_reach(
    addresses: Sequence[str], port: int, connect: Callable[[str, int], Reached] = reach
) -> tuple[Finding, Reached | None]:
    """Check whether a coordinator listens there: one that speaks ZeroMQ, and with keys."""
    trouble = failure("reach", "the name means no address")
    for address in addresses:
        try:
            found = connect(address, port)
        except OSError as error:
            trouble = _unreached(f"{address} port {port}", error, port)
            continue
        return _greeted(found, port), found
    return trouble, None


def _unreached(where: str, error: OSError, port: int) -> Finding:
    if isinstance(error, ConnectionRefusedError):
        text = f"{where}: the machine is there, but no program listens"
        return failure("reach", text, "on the coordinator: coordinator serve --config run.yaml")
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        text = f"{where}: no answer; a firewall, a wrong address, or the machine is off"
        return failure("reach", text, f"on the coordinator: sudo ufw allow {port}/tcp")
    text = f"{where}: {error.strerror or error}"
    return failure("reach", text, "ip route; ping the coordinator; is this device on its network?")


def _greeted(found: Reached, port: int) -> Finding:
    where, greeting = f"{found.address} port {port}", found.greeting
    if not greeting:
        text = f"{where} takes the connection and says nothing: a proxy, a tunnel or a port forward"
        return failure("reach", f"{text} without a coordinator behind it", "check its other end")
    if len(greeting) < GREETING_BYTES or greeting[0] != 0xFF or greeting[9] != 0x7F:
        text = f"{where} does not speak ZeroMQ: another program listens there"
        return failure("reach", text, "coordinator=tcp://HOST:PORT, the port of its `listen`")
    mechanism = greeting[12:32].rstrip(b"\0").decode("ascii", "replace")
    if mechanism != "CURVE":
        text = f"{where} speaks ZeroMQ without keys ({mechanism}): no coordinator of ours"
        return failure("reach", text, "coordinator=tcp://HOST:PORT, the port of its `listen`")
    return ok("reach", f"{where} answers in {_ms(found.seconds)} and wants keys")


def _addresses() -> dict[str, list[str]]:
    return {
        name: [str(one.address).split("%")[0] for one in found]
        for name, found in psutil.net_if_addrs().items()
    }


def check_mtu(
    found: Reached,
    root: Path = ROOT,
    interfaces: Callable[[], Mapping[str, Sequence[str]]] = _addresses,
) -> Finding:
    """Find the interface through which the way leads, and how large its packets may be."""
    local = found.local.split("%")[0]
    name = next((name for name, ours in interfaces().items() if local in ours), None)
    mtu = None if name is None else read_number(root / "sys/class/net" / name / "mtu")
    if name is None or mtu is None:
        return skipped("mtu", f"no interface here has the address {local}")
    folder = root / "sys/class/net" / name
    speed = read_number(folder / "speed") if read_text(folder / "speed") != "-1" else None
    kind = ", Wi-Fi" if (folder / "wireless").exists() else ""
    rate = f", {speed} Mbit/s" if speed is not None and speed > 0 else ""
    text = f"{name}{kind}{rate}, MTU {mtu}, {found.segment_bytes} bytes in a packet"
    if mtu < LEAST_MTU:
        return warning("mtu", f"{text}: too small", f"sudo ip link set dev {name} mtu 1500")
    return ok("mtu", text)


def check_handshake(found: Handshake, public: str) -> Finding:
    """Check whether each side takes the other's key."""
    if found.refused == 400:
        text = "the coordinator does not know this device's key"
        cure = f"there: coordinator client register NAME '{public}', or coordinator enrol NAME"
        return failure("handshake", text, cure)
    if found.refused is not None:
        text = f"the coordinator could not judge this device's key (status {found.refused})"
        return failure("handshake", text, "look at the coordinator's log")
    if not found.is_up:
        text = "the coordinator closes the connection: server_key is not its key"
        if not found.drops:
            text = f"no end of it within {HANDSHAKE_S:.0f} s"
        return failure("handshake", text, "copy coordinator.key.pub anew, and server_key=FILE")
    if found.round_trip_s is None:
        text = "the keys are right, but the coordinator answers nothing: it hangs"
        return failure("handshake", text, "look at the coordinator's log; restart it")
    return ok("handshake", f"both keys are right, an answer takes {_ms(found.round_trip_s)}")


# ---- with a session ------------------------------------------------------------------------------


class Session(NamedTuple):
    """What a short session with the coordinator has brought."""

    welcome: Welcome | None
    speed: LinkSpeed | None
    trouble: EdgeError | None
    """Reason why the rest is missing; None if it is there, or if time ran out."""


def open_session(config: LinkConfig, model_hash: str, timeout_s: float = SESSION_S) -> Session:
    """Greet the coordinator, measure the link, say goodbye; takes no part in its run.

    Is refused while the same key has one open.
    """
    stop, welcome, speed = threading.Event(), None, None
    timer = threading.Timer(timeout_s, stop.set)
    timer.start()
    try:
        with ZmqLink(config) as link:
            inbox = Inbox(link, stop)
            # No backend is named: graphs for onnxruntime would be made that nobody fetches.
            hello: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "codecs": float_codecs()}
            version = package_version()
            link.send(Hello(stamp=Stamp(), sdk_version=version, model_hash=model_hash, **hello))
            try:
                welcome = inbox.wait_for(Welcome).message
                inbox.enter(State.PROFILING)
                speed = probe(link, inbox, welcome.stamp)
            finally:
                stamp = Stamp() if welcome is None else welcome.stamp
                with suppress(EdgeError):
                    link.send(Goodbye(stamp=stamp, reason="the doctor has seen enough"))
                    link.close(FAREWELL_S)
    except (Stopped, RunEnded):
        return Session(welcome, speed, None)
    except EdgeError as error:
        return Session(welcome, speed, error)
    finally:
        timer.cancel()
    return Session(welcome, speed, None)


def check_session(found: Session, chunk_bytes: int) -> list[Finding]:
    """Check whether the coordinator would take this device in, and measure the link."""
    if found.welcome is None:
        return [_unwelcome(found), skipped("link", "there was no session to measure in")]
    ours, theirs = package_version(), found.welcome.sdk_version
    text = (
        f"run {found.welcome.stamp.run} would take this device in as {found.welcome.stamp.device}"
    )
    versions = f"edgesplit {ours} here, {theirs} there, protocol {found.welcome.protocol}"
    session = ok("session", f"{text}; {versions}")
    if ours != theirs:
        cure = f"pip install 'edgesplit=={theirs}' here, or {ours} there"
        session = warning("session", f"{text}; {versions}", cure)
    if found.speed is None:
        return [session, _unmeasured(found)]
    rate = found.speed
    text = (
        f"round trip {_ms(rate.round_trip_s)}, {_rate(rate.up_bytes_per_s)} up, "
        f"{_rate(rate.down_bytes_per_s)} down"
    )
    is_slow = min(rate.up_bytes_per_s, rate.down_bytes_per_s) < SLOW_BYTES_PER_S
    if is_slow and chunk_bytes > SMALL_CHUNK_BYTES:
        return [session, warning("link", f"{text}: slow", f"chunk_bytes={SMALL_CHUNK_BYTES}")]
    return [session, ok("link", text)]


def _unwelcome(found: Session) -> Finding:
    if isinstance(found.trouble, RefusedError):
        cure = "the line says what differs; see docs/operations.md"
        return failure("session", f"the coordinator refuses: {one_line(found.trouble)}", cure)
    if found.trouble is not None:
        return failure("session", one_line(found.trouble), "look at the coordinator's log")
    text = f"no welcome within {SESSION_S:.0f} s: it is busy, or its run is over"
    return failure("session", text, "coordinator status RUN; look at its log")


def _unmeasured(found: Session) -> Finding:
    if found.trouble is not None and not isinstance(found.trouble, PeerGone):
        return failure("link", one_line(found.trouble), "look at the coordinator's log")
    text = f"no end of measuring within {SESSION_S:.0f} s: very slow, or large packets are lost"
    return failure("link", text, "sudo ip link set dev INTERFACE mtu 1400, and look again")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s / 1e6:,.1f} Mbit/s"
