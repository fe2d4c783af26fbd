"""Devices that take turns: order, endings and failures, without a coordinator's rounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.gateway.interface import Event, Received
from coordinator.lab.simulation.device import SharedCompute, SimulatedDevice, SimulationListener
from coordinator.lab.simulation.gateway import SimulatedGateway
from edge_sdk.client.config import ClientConfig
from edge_sdk.errors import PeerGone, RefusedError, TransportError
from edge_sdk.protocol.messages import Hello, Message, Refused, RunOver, Stamp


class Heard(SimulationListener):
    """Keeps what travelled."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str, int]] = []

    def up(self, device: str, message: Message, num_bytes: int) -> None:
        """Keep it."""
        self.sent.append(("up", device, type(message).__name__, num_bytes))

    def down(self, device: str, message: Message, num_bytes: int) -> None:
        """Keep it."""
        self.sent.append(("down", device, type(message).__name__, num_bytes))


@pytest.fixture
def heard() -> Heard:
    """A listener."""
    return Heard()


@pytest.fixture
def gateway(tmp_path: Path, heard: Heard) -> Iterator[SimulatedGateway]:
    """Three devices that say Hello and wait."""
    config = ClientConfig(coordinator="tcp://nobody:0", server_key="", state=tmp_path)
    with SharedCompute(heard) as shop:
        devices = {name: SimulatedDevice(name, config, None, shop) for name in "cab"}
        with SimulatedGateway(devices, heard) as made:
            yield made


def kinds(events: list[Event]) -> list[tuple[str, Any]]:
    """Who did what."""
    return [
        (event.device, type(event.envelope.message) if isinstance(event, Received) else type(event))
        for event in events
    ]


def test_devices_act_in_the_order_of_their_names(gateway: SimulatedGateway) -> None:
    """Equal simulations see equal events in equal order."""
    events = gateway.events(0.0)

    assert kinds(events) == [("a", Hello), ("b", Hello), ("c", Hello)]
    assert gateway.devices() == ["a", "b", "c"]


def test_traffic_is_that_of_the_packets(gateway: SimulatedGateway, heard: Heard) -> None:
    """The listener hears every message with the bytes that the link counts."""
    gateway.events(0.0)
    gateway.send("b", RunOver(stamp=Stamp(), reason="done"))

    stats = gateway.stats("b")
    assert heard.sent[1] == ("up", "b", "Hello", stats.bytes_up)
    assert heard.sent[3] == ("down", "b", "RunOver", stats.bytes_down)
    assert stats.bytes_up > 0
    assert stats.bytes_down > 0


def test_only_who_has_news_gets_a_turn(gateway: SimulatedGateway) -> None:
    """A device that was told that the run is over leaves; the others are not disturbed."""
    gateway.events(0.0)
    gateway.send("b", RunOver(stamp=Stamp(), reason="done"))

    events = gateway.events(0.0)

    assert [event.device for event in events] == ["b"]
    assert gateway.devices() == ["a", "c"]
    with pytest.raises(PeerGone, match="'b'"):
        gateway.send("b", RunOver(stamp=Stamp(), reason="done"))


def test_a_wake_comes_before_the_devices(gateway: SimulatedGateway) -> None:
    """A coordinator with a result to collect does that first."""
    gateway.wake()

    assert gateway.events(0.0) == []
    assert len(gateway.events(0.0)) == 3


def test_a_simulation_that_cannot_go_on_says_so(gateway: SimulatedGateway) -> None:
    """Everybody waits for everybody else: an error, not an endless loop."""
    gateway.events(0.0)

    with pytest.raises(TransportError, match="stands still"):
        gateway.events(0.0)


def test_a_refused_device_ends_the_simulation(gateway: SimulatedGateway) -> None:
    """Its error names it."""
    gateway.events(0.0)
    gateway.send("c", Refused(stamp=Stamp(), reason="no such luck"))
    gateway.drop("c", "refused")

    with pytest.raises(RefusedError, match="device 'c': no such luck"):
        gateway.events(0.0)


def test_closing_ends_every_device(tmp_path: Path, heard: Heard) -> None:
    """Wherever they are: not yet started, waiting, or gone."""
    config = ClientConfig(coordinator="tcp://nobody:0", server_key="", state=tmp_path)
    with SharedCompute(heard) as shop:
        devices = {name: SimulatedDevice(name, config, None, shop) for name in "ab"}
        with SimulatedGateway(devices, heard):
            devices["a"].advance()

    assert all(device.is_over for device in devices.values())
    assert [device.error for device in devices.values()] == [None, None]
