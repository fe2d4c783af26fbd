"""The devices of the fleet benchmark keep to the protocol as real ones do."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Event, Joined, Received
from edge_sdk.deadline import Deadline
from edge_sdk.protocol.messages import Hello, RoundStart, Stamp
from edge_sdk.transport.keys import make_key_pair

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fleet_sessions() -> Iterator[ModuleType]:
    """Import the module, which belongs to no package."""
    path = ROOT / "benchmarks" / "fleet_sessions.py"
    spec = importlib.util.spec_from_file_location("fleet_sessions", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fleet_sessions"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fleet_sessions"]


def test_what_answers_a_lost_session_is_dropped(fleet_sessions: ModuleType, tmp_path: Path) -> None:
    """A round's start and the loss of its session, taken in together, lead to Hello alone."""
    found: list[Event] = []

    def serve_until(kind: type, number: int) -> None:
        deadline = Deadline.after(30.0)
        while sum(isinstance(event, kind) for event in found) < number:
            assert deadline.left_s(), found
            sessions.run(time.monotonic() + 0.01)
            found.extend(gateway.events(0.0))

    config = GatewayConfig(address="tcp://127.0.0.1:*", insecure=True)
    with ZmqGateway(config) as gateway:
        facts = fleet_sessions.FleetFacts(gateway.address, "", 2, 4, 8, "server")
        sessions = fleet_sessions.Sessions(tmp_path / "log")
        sessions.reserve(1)
        device = fleet_sessions.Device(sessions, facts, "d0", make_key_pair())
        device.start()
        serve_until(Received, 1)
        before = gateway.stats("d0").bytes_down
        start = RoundStart(stamp=Stamp(run="r", device="d0"), end_step=3, is_full=True)
        gateway.send("d0", start)
        deadline = Deadline.after(30.0)
        while gateway.stats("d0").bytes_down <= before:  # it has left, and nobody takes it in yet
            assert deadline.left_s()
            time.sleep(0.01)
        gateway.forget("d0", "hangs")
        time.sleep(0.3)
        serve_until(Joined, 2)
        serve_until(Received, 2)
        device.leave(politely=False)
        sessions.close()

    told = [event.envelope.message for event in found if isinstance(event, Received)]
    assert [type(message) for message in told] == [Hello, Hello]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log").read_text().splitlines()]
    assert [kind for kind in kinds if kind != "count"] == ["start", "lost"]
