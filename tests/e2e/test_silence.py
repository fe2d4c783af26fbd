"""Devices that fall silent or hang: the run goes on, and they come back by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest

from coordinator.config.run import DeviceSettings
from coordinator.results.events.devices import DeviceJoined, DeviceLeft
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import DevicesCutOff, RoundDone, RoundStarted, Telemetry
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.deadline import Deadline
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Activation,
    AdapterUpload,
    Failure,
    Hello,
    Message,
    PartRequest,
    Refused,
    Stamp,
    StepReport,
    TopGradient,
)
from edge_sdk.transport.keys import load_key_pair
from edge_sdk.transport.link import NO_TENSORS, LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import PATIENCE_S, Cluster, Serving, Trap, held_out, sentences, wait_all

DEVICES = {
    "a": DeviceSettings(split=1, batch_size=2),
    "b": DeviceSettings(split=3, batch_size=3),
    "c": DeviceSettings(split=4, batch_size=4),
}
# A device that says something every BEAT_S is silent after SILENCE_S, on a slow machine too.
BEAT_S, SILENCE_S = 0.1, 3.0
# Long enough for every honest step of these tests.
HANG_S = 6.0


class Suspended(Callback):
    """A device that stands still, its link included, when it has trained *step*."""

    def __init__(self, step: int) -> None:
        self._step, self._is_running = step, threading.Event()
        self._is_running.set()
        self.is_asleep = threading.Event()

    def on_step_end(self, report: StepReport) -> None:
        """Fall asleep once, the main thread first."""
        if report.stamp.step >= self._step and not self.is_asleep.is_set():
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
        self.is_ready = threading.Event()
        self.cut_off, self.has_row = threading.Event(), threading.Event()
        self.has_late = threading.Event()
        """Set when a round has ended in which work came too late for another."""
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
            self.is_ready.set()
        elif isinstance(event, DevicesCutOff) and "b" in event.devices:
            self.cut_off.set()
        elif isinstance(event, RoundDone) and "b" in event.row.get("cut_off", []):
            self.has_row.set()
        elif isinstance(event, Telemetry) and "b" in event.late:
            self.has_late.set()
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
    threading.Timer((factor - (factor > 1.0)) * SILENCE_S, asleep.wake).start()
    wait_all(clients)

    assert serving.wait() == "completed"
    assert len(serving.rows) == 4
    assert_samples(serving)
    if factor > 1.0:
        assert trap.left["b"]


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
    assert trap.left["b"]


class Hung(Callback):
    """A device whose own thread stands still at one moment, while its link lives."""

    def __init__(self, moment: str) -> None:
        self._moment, self._may_go_on = moment, threading.Event()
        self.is_hung = threading.Event()

    def hang(self, moment: str) -> None:
        """Stand still, if that is the moment, once."""
        if moment == self._moment and not self.is_hung.is_set():
            self.is_hung.set()
            self._may_go_on.wait(PATIENCE_S)

    def wake(self) -> None:
        """Go on."""
        self._may_go_on.set()

    def on_step_end(self, report: StepReport) -> None:
        """Stand between two steps, or before the upload, which comes after the last of three."""
        self.hang("before the upload" if report.stamp.step == 2 else f"step {report.stamp.step}")

    def link(self, cluster: Cluster, name: str) -> HangingLink:
        """Return a link that stands still with the device."""
        keys = load_key_pair(cluster.folder / f"{name}.key")
        address, server_key = cluster.address, cluster.public
        return HangingLink(
            LinkConfig(address=address, server_key=server_key, keys=keys, beat_s=BEAT_S), self
        )


class HangingLink(ZmqLink):
    """A link whose user hangs before certain messages are sent."""

    def __init__(self, config: LinkConfig, hung: Hung) -> None:
        super().__init__(config)
        self._hung = hung

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Stand still before a message of the moment."""
        if isinstance(message, Activation):
            self._hung.hang("in evaluation" if message.is_eval else "before the first activation")
        elif isinstance(message, TopGradient):
            self._hung.hang("after the lift")
        elif isinstance(message, AdapterUpload):
            self._hung.hang("with the upload")
        super().send(message, tensors)


MOMENTS = ["before the first activation", "after the lift", "before the upload", "in evaluation"]


def hung_run(
    cluster: Cluster, moment: str, **settings: Any
) -> tuple[Serving, Comings, Hung, list[EdgeClient]]:
    """Start a run whose device b hangs at *moment*."""
    trap, hung = Comings(), Hung(moment)
    config = cluster.config(devices=DEVICES, labels="device", **settings)
    serving = cluster.serve(config, trap=trap)
    serving.state.wait_for(DEVICES)  # also where fewer of them are enough
    serving.start()
    clients = cluster.start("a", "c", data=held_out())
    link, rows = hung.link(cluster, "b"), sentences(ord("b"))
    clients.append(cluster.client("b", rows, hung, link, data=held_out()).start())
    return serving, trap, hung, clients


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_device_that_hangs_is_named_lost_and_comes_back(cluster: Cluster, moment: str) -> None:
    """Although its heartbeats live; when it wakes it trains to the end, with all samples."""
    serving, trap, hung, clients = hung_run(cluster, moment, patience_s=HANG_S)

    assert hung.is_hung.wait(PATIENCE_S)
    assert trap.has_left.wait(PATIENCE_S)
    hung.wake()
    wait_all(clients)

    assert serving.wait() == "completed"
    assert_samples(serving)
    assert len(serving.rows) == 3
    assert any(why.startswith("hangs: no progress for ") for why in trap.left["b"])
    assert any(": waiting " in note and " for b" in note for note in trap.notes)
    assert any(row["event"] == "waiting" and row["devices"] == ["b"] for row in serving.events)


def test_a_run_with_enough_others_goes_on_without_a_hung_device(cluster: Cluster) -> None:
    """It completes while the device still hangs; each round has whole devices in it."""
    serving, trap, hung, clients = hung_run(
        cluster, "after the lift", patience_s=HANG_S, min_devices=2
    )

    assert hung.is_hung.wait(PATIENCE_S)
    assert serving.wait() == "completed"
    wait_all(clients[:2])

    assert_samples(serving)
    assert trap.left["b"]
    clients[2].stop()
    hung.wake()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_takes_less_than_ten_seconds_whoever_hangs(cluster: Cluster, moment: str) -> None:
    """Ctrl-C on the coordinator: the newest checkpoint counts, and the run completes from it."""
    serving, _, hung, clients = hung_run(cluster, moment)
    assert hung.is_hung.wait(PATIENCE_S)

    began_s = time.monotonic()
    serving.coordinator.stop()
    assert serving.wait() == "paused"
    assert time.monotonic() - began_s < 10.0

    hung.wake()
    again = cluster.serve(serving.config).start()
    wait_all(clients)
    assert again.wait() == "completed"
    assert_samples(again)
    assert len(again.rows) == 3


@pytest.mark.parametrize("moment", ["before the first activation", "with the upload"])
def test_a_round_over_its_deadline_goes_on_without_who_is_late(
    cluster: Cluster, moment: str
) -> None:
    """With enough others; what comes late is dropped and counted, and it is in the next round."""
    serving, trap, hung, _ = hung_run(
        cluster, moment, min_devices=2, round_deadline_s=2.0, rounds=100_000
    )

    assert trap.cut_off.wait(PATIENCE_S)
    hung.wake()
    assert trap.has_late.wait(PATIENCE_S)
    assert trap.has_row.wait(PATIENCE_S)
    serving.coordinator.stop()
    assert serving.wait() == "paused"

    assert_samples(serving)
    rows = [row for row in serving.rows if "b" in row.get("cut_off", [])]
    assert rows
    assert rows[0]["samples"] == 3 * (2 + 4)
    late = [row["late"] for row in serving.folder.rows("telemetry.jsonl") if "late" in row]
    assert any(row.get("b", 0) >= 1 for row in late)
    assert any(row["event"] == "round.deadline" and "b" in row["devices"] for row in serving.events)


def test_who_breaks_the_rules_again_and_again_is_refused(cluster: Cluster) -> None:
    """Three times it is told what was wrong and may join again; then the run is over for it."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    hello = Hello(stamp=Stamp(), protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",))
    said = []
    for _ in range(4):
        with cluster.link("c") as link:
            link.send(hello)
            link.send(PartRequest(stamp=Stamp(), sha256="0" * 64, offset=0))
            answer: Any = None
            while not isinstance(answer, Failure | Refused):
                answer = link.receive(Deadline.after(PATIENCE_S)).message
            said.append(answer)

    assert [type(answer) for answer in said] == [Failure, Failure, Failure, Refused]
    assert "3 times" in said[-1].reason
    wait_all(cluster.start("a", "b"))
    assert serving.wait() == "completed"


@pytest.mark.parametrize("waits_for", ["a round", "an answer", "a coordinator that is gone"])
def test_a_device_that_waits_leaves_within_ten_seconds(cluster: Cluster, waits_for: str) -> None:
    """Ctrl-C on a device, whatever of the network it waits for."""
    hung = Hung("before the first activation")
    trap = Comings()
    serving = cluster.serve(cluster.config(devices=DEVICES), trap=trap).start()
    link = hung.link(cluster, "b")
    clients = [cluster.client("b", sentences(ord("b")), hung, link).start()]
    clients += cluster.start("a")
    if waits_for == "an answer":
        clients += cluster.start("c")
        assert hung.is_hung.wait(PATIENCE_S)
    else:
        assert trap.is_ready.wait(PATIENCE_S)
    if waits_for == "a coordinator that is gone":
        serving.gateway.close()

    began_s = time.monotonic()
    clients[1].stop()
    assert clients[1].wait(10.0)
    assert time.monotonic() - began_s < 10.0
    hung.wake()
