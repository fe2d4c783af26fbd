"""Devices that fall silent or hang: the run goes on, and they come back by themselves."""

from __future__ import annotations

import threading
from itertools import combinations

import pytest

from coordinator.config.run import DeviceSettings
from coordinator.results.events import DeviceJoined, DeviceLeft, RoundStarted, RunEvent
from edge_sdk.client.callbacks import Callback
from edge_sdk.protocol.messages import StepReport
from edge_sdk.transport.keys import load_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import PATIENCE_S, Cluster, Serving, Trap, sentences, wait_all

DEVICES = {
    "a": DeviceSettings(split=1, batch_size=2),
    "b": DeviceSettings(split=3, batch_size=3),
    "c": DeviceSettings(split=4, batch_size=4),
}
# A device that says something every BEAT_S is silent after SILENCE_S, on a slow machine too.
BEAT_S, SILENCE_S = 0.1, 1.5


class Suspended(Callback):
    """A device that stands still, its link included, when it has trained *step*."""

    def __init__(self, step: int) -> None:
        self._step, self._is_running = step, threading.Event()
        self._is_running.set()
        self.is_asleep = threading.Event()

    def on_step_end(self, report: StepReport) -> None:
        """Fall asleep once, the main thread first."""
        if report.stamp.step == self._step and not self.is_asleep.is_set():
            self._is_running.clear()
            self.is_asleep.set()
            self._is_running.wait(PATIENCE_S)

    def telemetry(self) -> dict[str, float]:
        """Stop the link's thread at its next heartbeat, for as long as the device sleeps."""
        self._is_running.wait(PATIENCE_S)
        return {}

    def wake(self) -> None:
        """Let everything go on where it stood."""
        self._is_running.set()

    def link(self, cluster: Cluster, name: str) -> ZmqLink:
        """Return the link that sleeps with the device."""
        keys = load_key_pair(cluster.folder / f"{name}.key")
        address, server_key = cluster.address, cluster.public
        link = LinkConfig(address=address, server_key=server_key, keys=keys, beat_s=BEAT_S)
        return ZmqLink(link, self.telemetry)


class Comings(Trap):
    """A watcher of who leaves and who joins."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, list[str]] = {}
        self.joined: dict[str, int] = {}
        self.has_left = threading.Event()
        self.is_back = threading.Event()
        """Set when a device that left is in a round again."""

    def see(self, event: RunEvent) -> None:
        """Count it."""
        super().see(event)
        if isinstance(event, DeviceLeft):
            self.left.setdefault(event.device, []).append(event.reason)
            self.has_left.set()
        elif isinstance(event, DeviceJoined):
            self.joined[event.device] = self.joined.get(event.device, 0) + 1
        elif isinstance(event, RoundStarted) and self.left.keys() & set(event.devices):
            self.is_back.set()


def assert_samples(serving: Serving) -> None:
    """Check that each round has whole devices in it, at least as many as it needs, each once."""
    sizes = {name: settings.batch_size or 0 for name, settings in DEVICES.items()}
    steps, least = serving.config.steps_per_round, serving.config.min_devices
    allowed = {
        steps * sum(sizes[name] for name in names)
        for number in range(least, len(sizes) + 1)
        for names in combinations(sizes, number)
    }
    found = [row["samples"] for row in serving.rows[1:]]
    assert set(found) <= allowed


@pytest.mark.parametrize("factor", [0.5, 1.5, 5.0])
def test_a_device_that_was_silent_comes_back(cluster: Cluster, factor: float) -> None:
    """Suspended for half, one and a half or five times the patience, it trains to the end."""
    trap, asleep = Comings(), Suspended(step=1)
    config = cluster.config(devices=DEVICES, patience_s=SILENCE_S, rounds=3)
    serving = cluster.serve(config, trap=trap).start()
    clients = cluster.start("a", "c")
    link = asleep.link(cluster, "b")
    clients.append(cluster.client("b", sentences(ord("b")), asleep, link).start())

    assert asleep.is_asleep.wait(PATIENCE_S)
    if factor > 1.0:
        assert trap.has_left.wait(PATIENCE_S)
        factor -= 1.0
    threading.Timer(factor * SILENCE_S, asleep.wake).start()
    wait_all(clients)

    assert serving.wait() == "completed"
    assert len(serving.rows) == 4
    assert_samples(serving)
    if trap.left:
        assert trap.left["b"][0].startswith("silent for ")


def test_others_go_on_and_it_comes_back(cluster: Cluster) -> None:
    """With enough other devices the round goes on without the silent one, a later one with it."""
    trap, asleep = Comings(), Suspended(step=1)
    config = cluster.config(devices=DEVICES, min_devices=2, patience_s=SILENCE_S, rounds=100_000)
    serving = cluster.serve(config, trap=trap).start()
    clients = cluster.start("a", "c")
    link = asleep.link(cluster, "b")
    clients.append(cluster.client("b", sentences(ord("b")), asleep, link).start())

    assert trap.has_left.wait(PATIENCE_S)
    asleep.wake()
    assert trap.is_back.wait(PATIENCE_S)
    serving.coordinator.stop()

    assert serving.wait() == "paused"
    assert_samples(serving)
    assert list(trap.left) == ["b"]
