"""Enrolment over real sockets: who has a code enrols once, and nobody else does anything."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from coordinator.gateway import doorkeeper
from coordinator.gateway.doorkeeper import Caller, Doorkeeper
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Joined, Left, Registered
from coordinator.gateway.keys import enrolment_desk as desks
from coordinator.gateway.keys import zap
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.enrolment_desk import EnrolDesk
from coordinator.gateway.keys.refused_keys import RefusedKeys, read_refused, refused_path
from coordinator.gateway.keys.zap import ZAP_DOMAIN, ZapHandler
from coordinator.gateway.ration import Trouble
from edge_sdk.errors import PeerGone, RefusedError
from edge_sdk.protocol import packets
from edge_sdk.transport import enrol
from edge_sdk.transport.enrol import redeem
from edge_sdk.transport.enrol_code import EnrolCode, new_code, one_time_keys
from edge_sdk.transport.keys import make_key_pair
from tests.coordinator.gateway.conftest import ONE, SERVER, TWO
from tests.coordinator.gateway.test_gateway import RawDevice, open_link, until

THREE = make_key_pair()


@pytest.fixture
def allowed(tmp_path: Path) -> AllowList:
    """One device, `one`."""
    made = AllowList(tmp_path / "devices.yaml")
    made.register("one", ONE.public)
    return made


@pytest.fixture
def gateway(allowed: AllowList) -> Iterator[ZmqGateway]:
    """An open gateway."""
    with ZmqGateway(GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER), allowed) as opened:
        yield opened


Make = Callable[..., EnrolCode]


@pytest.fixture
def make(gateway: ZmqGateway, allowed: AllowList) -> Make:
    """Make a code, as `coordinator enrol` does beside a coordinator that serves."""

    def make(name: str = "two", **options: object) -> EnrolCode:
        book = EnrolmentBook(allowed.path)
        return book.make_code(name, gateway.address, SERVER.public, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused device asks again soon."""
    monkeypatch.setattr(enrol, "AGAIN_S", 0.3)


def test_a_code_lets_a_device_in_at_once(gateway: ZmqGateway, make: Make) -> None:
    """Made beside a coordinator that serves, redeemed at once, and a session opens at once."""
    assert redeem(make(), TWO.public) == "two"

    found = until(gateway, Registered)[-1]
    assert found == Registered("two", TWO.public, "127.0.0.1")
    with open_link(gateway, TWO):
        assert until(gateway, Joined)[-1].device == "two"


def test_a_lost_answer_is_given_again(gateway: ZmqGateway, make: Make) -> None:
    """The same device may ask a second time, and nobody is told of it twice."""
    code = make()
    assert [redeem(code, TWO.public) for _ in range(2)] == ["two", "two"]

    assert sum(isinstance(event, Registered) for event in until(gateway, Registered)) == 1
    assert not [event for event in gateway.events(0.5) if isinstance(event, Registered)]


def test_a_replaced_device_is_sent_away(gateway: ZmqGateway, make: Make) -> None:
    """`--replace` ends the live session of the old key, within a second."""
    with open_link(gateway, ONE):
        until(gateway, Joined)
        began_s = time.monotonic()
        assert redeem(make("one", replaces=True), TWO.public) == "one"
        until(gateway, Left)
        assert time.monotonic() - began_s < 5.0


HOSTILE: dict[str, tuple[Callable[[Make, EnrolCode], EnrolCode], str, str]] = {
    "another secret": (
        lambda make, code: new_code(code.address, SERVER.public),
        THREE.public,
        "does not know this code",
    ),
    "used": (
        lambda make, code: (redeem(code, TWO.public), code)[1],
        THREE.public,
        "used already, by the key",
    ),
    "expired": (
        lambda make, code: (make("two", lasts_s=0.001), time.sleep(0.01))[0],
        THREE.public,
        r"expired \d s ago",
    ),
    "withdrawn": (lambda make, code: (make("two"), code)[1], THREE.public, "a newer one was made"),
    "a key of another name": (
        lambda make, code: code,
        ONE.public,
        "key is registered as 'one' already",
    ),
    "no key": (lambda make, code: code, "#" * 40, "does not answer|does not prove"),
    "another coordinator's key": (
        lambda make, code: new_code(code.address, THREE.public),
        TWO.public,
        "does not prove that it has the key in the code",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_whoever_is_not_meant_does_not_enrol(
    gateway: ZmqGateway, allowed: AllowList, make: Make, case: str
) -> None:
    """Each is told why in words of its own, and the list stays as it was."""
    prepare, key, words = HOSTILE[case]
    code = prepare(make, make())
    before = AllowList(allowed.path).devices()

    with pytest.raises((RefusedError, PeerGone), match=words):
        redeem(code, key, 1.5)

    assert AllowList(allowed.path).devices() == before


def test_nobody_is_told_apart_from_what_is_not_there(tmp_path: Path) -> None:
    """Where no program listens, and where no machine is, the words differ."""
    with pytest.raises(PeerGone, match="nobody listens at .* no coordinator serves"):
        redeem(new_code("tcp://127.0.0.1:9", SERVER.public), TWO.public, 2.0)
    with pytest.raises(PeerGone, match="cannot reach .*the address in the code"):
        redeem(new_code("tcp://no-such-host.invalid:7070", SERVER.public), TWO.public, 2.0)


def test_with_a_code_nothing_is_done_but_to_enrol(gateway: ZmqGateway, make: Make) -> None:
    """Whoever has a code and sends anything else opens no session and is cut off unread."""
    keys = one_time_keys(make())
    for number, frame in enumerate(
        (
            packets.control_frame(packets.Detach(session="")),
            packets.control_frame(packets.Enrol(key="no key", sdk_version="")),
            packets.prefix(packets.Kind.FIRST, 0, 1, 0, 0, 4) + b"\0\0\0\0",
            b"",
            b"x" * 4000,
        )
    ):
        with RawDevice(gateway, keys, is_attached=False) as raw:
            if number == 0:
                raw.attach()
            raw.socket.send(frame)
            raw.socket.rcvtimeo = 300
            with pytest.raises(zmq.Again):
                raw.read()

    assert gateway.devices() == []
    assert gateway.events(0.2) == []


def test_whatever_a_code_holder_sends_ends_nothing(allowed: AllowList) -> None:
    """Bytes, and control frames with what nobody expects in them: each is passed over."""
    draw, context = random.Random(0), zmq.Context()
    router = context.socket(zmq.ROUTER)
    door = Doorkeeper(context, router, Trouble())
    book, answers = EnrolmentBook(allowed.path), []
    desk = EnrolDesk(book, allowed, door, lambda _, said: answers.append(said), answers.append)
    code = book.make_code("two", "tcp://10.0.0.1:7070", SERVER.public)
    frames = [draw.randbytes(draw.randrange(200)) for _ in range(200)]
    for text in ("", "\0" * 2000, "\x1b[2J", "../x", "#" * 40, " " * 40, TWO.public[:-1]):
        said = (
            packets.Enrol(key=text, sdk_version=text),
            packets.Enrolled(name=text),
            packets.EnrolRefused(reason=text, may_pass=True),
            packets.Closed(session=text, reason=text),
            packets.Heartbeat(sent_s=1e300, rtt_s=-1.0, numbers={text: -1e300}),
        )
        frames += map(packets.control_frame, said)
    try:
        for frame in frames:
            caller = Caller(b"r", "", one_time_keys(code).public, zmq.Frame(frame), None)
            assert desk.takes(caller, 1.0)
    finally:
        door.close()
        router.close(0)
        context.term()

    assert answers == []
    assert AllowList(allowed.path).devices() == {"one": ONE.public}


def test_with_a_code_nobody_asks_without_end(
    gateway: ZmqGateway, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few questions, a stranger's bytes and seconds; then the connection is closed."""
    monkeypatch.setattr(doorkeeper, "GREETING_S", 1.0)
    keys = one_time_keys(make(replaces=True))
    question = packets.control_frame(packets.Enrol(key=ONE.public, sdk_version=""))
    with RawDevice(gateway, keys, is_attached=False) as raw:
        for _ in range(desks.MOST_QUESTIONS + 1):
            raw.socket.send(question)
        num_answers = 0
        while raw.socket.poll(1000):
            assert isinstance(raw.read(), packets.EnrolRefused)
            num_answers += 1
        assert num_answers <= desks.MOST_QUESTIONS
    with RawDevice(gateway, keys, is_attached=False) as idle:
        monitor = idle.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        idle.socket.send(question)
        assert isinstance(idle.read(), packets.EnrolRefused)
        assert monitor.poll(20_000), "it is not sent away"


def test_thousands_of_guesses_find_nothing_and_keep_nobody_out(tmp_path: Path) -> None:
    """Of one address 200 keys are looked up, and 20 a second; others, and devices, get in."""
    allowed = AllowList(tmp_path / "devices.yaml")
    allowed.register("one", ONE.public)
    book = EnrolmentBook(allowed.path)
    code = one_time_keys(book.make_code("two", "tcp://10.0.0.1:7070", SERVER.public))
    looked_up: list[str] = []
    find = book.find
    book.find = lambda key: (looked_up.append(key), find(key))[1]  # type: ignore[method-assign]
    context = zmq.Context()
    refused = RefusedKeys(allowed.path)
    handler = ZapHandler(context, allowed, Trouble(), book, refused)
    asker = context.socket(zmq.REQ)
    asker.connect(zap.ZAP_ADDRESS)
    asker.rcvtimeo = 5000

    def status(key: bytes, address: str) -> bytes:
        domain = ZAP_DOMAIN.encode()
        asker.send_multipart([b"1.0", b"1", domain, address.encode(), b"", b"CURVE", key])
        handler.answer_all()
        return asker.recv_multipart()[2]

    try:
        began_s = time.monotonic()
        guesses = [status(number.to_bytes(32, "big"), "10.0.0.66") for number in range(1, 4000)]
        seconds = time.monotonic() - began_s
        right = status(z85.decode(code.public), "10.0.0.66")

        assert set(guesses) == {b"400"}
        assert len(looked_up) <= 200 + 20 * (seconds + 1.0)
        assert right == b"400", "whoever has guessed so often is not looked at"
        assert status(z85.decode(code.public), "10.0.0.7") == b"200"
        assert status(z85.decode(ONE.public), "10.0.0.66") == b"200"
        refused.save(1e6, lambda _: False)
        assert len(read_refused(refused.path)) <= 8
    finally:
        asker.close(0)
        handler.close()
        context.term()


def test_guesses_over_real_connections_disturb_nobody(gateway: ZmqGateway, make: Make) -> None:
    """More than are looked up: all are refused, a session lives, and the code is still good."""
    code, context = make(), zmq.Context()
    with open_link(gateway, ONE):
        until(gateway, Joined)
        for _ in range(5):
            guesses = []
            for keys in (one_time_keys(new_code(code.address, SERVER.public)) for _ in range(50)):
                sock = context.socket(zmq.DEALER)
                sock.curve_serverkey = SERVER.public.encode()
                sock.curve_publickey = keys.public.encode()
                sock.curve_secretkey = keys.secret.encode()
                monitor = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
                sock.connect(gateway.address)
                guesses.append((sock, monitor))
            assert all(monitor.poll(20_000) for _, monitor in guesses)
            for sock, monitor in guesses:
                sock.disable_monitor()
                monitor.close(0)
                sock.close(0)

        assert gateway.devices() == ["one"]
        assert redeem(code, TWO.public) == "two"
    context.term()


def test_a_stranger_without_a_code_trains_nobody(
    gateway: ZmqGateway, allowed: AllowList, make: Make
) -> None:
    """While a code is open, the key of a stranger still ends at the handshake, and is listed."""
    make()
    for _ in range(3):
        with RawDevice(gateway, THREE, is_attached=False) as stranger:
            stranger.attach()
            stranger.socket.rcvtimeo = 300
            with pytest.raises(zmq.Again):
                stranger.read()

    assert gateway.events(0.2) == []
    assert gateway.devices() == []
    deadline_s = time.monotonic() + 20.0
    while not (found := read_refused(refused_path(allowed.path))):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert [(one.key, one.source) for one in found] == [(THREE.public, "127.0.0.1")]

    AllowList(allowed.path).register("three", found[0].key)
    while read_refused(refused_path(allowed.path)):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    with open_link(gateway, THREE):
        assert until(gateway, Joined)[-1].device == "three"
