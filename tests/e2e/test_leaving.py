"""A device that leaves a round, in order or not, comes back to the step at which it left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundHeld, RoundSaved, StepDone
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.protocol.messages import StepReport
from tests.e2e.cluster import Cluster, DieAt, Died, Serving, Trap, sentences, wait_all

STEPS = 4


class Counted(Trap):
    """A watcher that counts how often each device has trained each step."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: Counter[tuple[str, int]] = Counter()
        self.held: list[RoundHeld] = []
        self.saved: list[int] = []

    def see(self, event: RunEvent) -> None:
        """Count it."""
        super().see(event)
        if isinstance(event, StepDone):
            self.trained[event.device, event.report.stamp.step] += 1
        elif isinstance(event, RoundHeld):
            self.held.append(event)
        elif isinstance(event, RoundSaved):
            self.saved.append(event.step)


class LeaveAt(Callback):
    """Stops its device when that has finished *step*."""

    client: EdgeClient | None = None

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, report: StepReport) -> None:
        """Stop it at the step."""
        if report.stamp.step == self._step and self.client is not None:
            self.client.stop()


def leaving_at(step: int, cluster: Cluster, name: str, **settings: Any) -> EdgeClient:
    """A device that stops, as with Ctrl-C, when it has finished *step*."""
    callback = LeaveAt(step)
    callback.client = cluster.client(name, sentences(ord(name)), callback, **settings)
    return callback.client


def config_of(cluster: Cluster, devices: str, **settings: Any) -> ServeConfig:
    """Two rounds of four steps of *devices*, whose micro-batches differ."""
    own = {
        "a": DeviceSettings(split=1, r=2),
        "b": DeviceSettings(split=3, batch_size=6, micro_batch=2),
        "c": DeviceSettings(split=4, r=3),
    }
    chosen = {name: own[name] for name in devices}
    training = replace(cluster.config().training, optimizer="adamw")
    return cluster.config(
        devices=chosen,
        min_devices=len(devices),
        steps_per_round=STEPS,
        training=training,
        **settings,
    )


Wholes = Callable[[str, str], Serving]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> Wholes:
    """Undisturbed runs, by devices and label mode, each made once."""

    @cache
    def run(devices: str, labels: str) -> Serving:
        cluster = Cluster(tmp_path_factory.mktemp("whole"), llama, parts)
        serving = cluster.serve(config_of(cluster, devices, labels=labels)).start()
        clients = cluster.start(*devices)
        assert serving.wait() == "completed"
        wait_all(clients)
        return serving

    return run


def assert_same(serving: Serving, whole: Serving) -> None:
    """Both have measured and learned the same, bit for bit."""
    assert serving.metrics == whole.metrics
    found, expected = serving.ledger.state(), whole.ledger.state()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def each_once(devices: str) -> dict[tuple[str, int], int]:
    """Every step of every device, trained once."""
    return dict.fromkeys(((name, step) for name in devices for step in range(2 * STEPS)), 1)


LEAVINGS = {
    "the only one, in mid-round": ("b", "server", 1),
    "the only one, at its end": ("b", "device", STEPS - 1),
    "one of three, in mid-round": ("abc", "device", 1),
    "one of three, in its last step": ("abc", "server", STEPS - 2),
    "one of three, at its end": ("abc", "server", STEPS - 1),
    "one of three, in the last round": ("abc", "device", STEPS + 1),
}


@pytest.mark.parametrize(("devices", "labels", "step"), LEAVINGS.values(), ids=LEAVINGS.keys())
def test_who_leaves_a_round_comes_back_to_its_step(
    cluster: Cluster, wholes: Wholes, devices: str, labels: str, step: int
) -> None:
    """Ctrl-C on a device that the round needs costs no step: none is trained twice, none lacks."""
    trap = Counted()
    serving = cluster.serve(config_of(cluster, devices, labels=labels), trap=trap).start()
    staying = [cluster.client(n, sentences(ord(n))).start() for n in devices if n != "b"]

    leaving_at(step, cluster, "b").start().wait()
    back = cluster.start("b")

    assert serving.wait() == "completed"
    wait_all([*staying, *back])
    assert trap.trained == each_once(devices)
    assert_same(serving, wholes(devices, labels))


DEATHS = {
    "the only one, in mid-round": ("b", "server", 2),
    "the only one, at its end": ("b", "device", STEPS - 1),
    "one of three, in mid-round": ("abc", "server", 2),
    "one of three, in the last step": ("abc", "device", 2 * STEPS - 1),
}


@pytest.mark.parametrize(("devices", "labels", "step"), DEATHS.values(), ids=DEATHS.keys())
def test_who_dies_in_a_round_costs_what_was_done_since_it_was_saved(
    cluster: Cluster, wholes: Wholes, devices: str, labels: str, step: int
) -> None:
    """With a checkpoint after each step a device that dies costs a step, and changes no bit."""
    trap = Counted()
    config = config_of(cluster, devices, labels=labels, save_every_s=0.0)
    serving = cluster.serve(config, trap=trap).start()
    staying = [cluster.client(n, sentences(ord(n))).start() for n in devices if n != "b"]

    dying = cluster.client("b", sentences(ord("b")), DieAt(step)).start()
    with pytest.raises(Died):
        dying.wait()
    back = cluster.start("b")

    assert serving.wait() == "completed"
    wait_all([*staying, *back])
    again = {place for place, times in trap.trained.items() if times > 1}
    assert again <= {(name, step) for name in devices}
    assert trap.trained.keys() == each_once(devices).keys()
    assert_same(serving, wholes(devices, labels))


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_coordinator_that_dies_costs_what_was_done_since_it_was_saved(
    cluster: Cluster, wholes: Wholes, labels: str
) -> None:
    """With a checkpoint after each step a killed coordinator goes on at the last one, exactly."""
    config, trap = config_of(cluster, "abc", labels=labels, save_every_s=0.0), Counted()
    killed = cluster.serve(config).crash_at(2).start()
    clients = cluster.start()
    assert killed.wait() == "crashed"

    resumed = cluster.serve(config, trap=trap).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert min(step for _, step in trap.trained) == 2
    assert_same(resumed, wholes("abc", labels))


def test_what_is_held_of_the_samples_is_saved_as_well(cluster: Cluster) -> None:
    """With the codec `residual` a device that dies changes no bit, where what it holds is kept."""
    own = {n: DeviceSettings(split=2, micro_batch=2, codec="residual") for n in "ab"}
    config = cluster.config(devices=own, min_devices=2, steps_per_round=14, save_every_s=0.0)
    whole = cluster.serve(replace(config, name="whole", save_every_s=None)).start()
    clients = cluster.start("a", "b", state=cluster.folder / "state-whole", keep_held=True)
    assert whole.wait() == "completed"
    wait_all(clients)
    serving = cluster.serve(config).start()

    dying = cluster.client("b", sentences(ord("b")), DieAt(11), keep_held=True).start()
    staying = cluster.start("a", keep_held=True)
    with pytest.raises(Died):
        dying.wait()
    back = cluster.start("b", keep_held=True)

    assert serving.wait() == "completed"
    wait_all([*staying, *back])
    assert_same(serving, whole)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_without_a_barrier_who_leaves_goes_on_with_its_tour(cluster: Cluster, labels: str) -> None:
    """A device that leaves in the middle of its tour repeats no step of it when it is back."""
    own = {"a": DeviceSettings(split=2, micro_batch=2)}
    config = cluster.config(
        devices=own,
        min_devices=1,
        steps_per_round=STEPS,
        labels=labels,
        round_mode="buffered",
        aggregation="exact",
    )
    trap = Counted()
    serving = cluster.serve(config, trap=trap).start()

    leaving_at(STEPS + 1, cluster, "a").start().wait()
    back = cluster.start("a")

    assert serving.wait() == "completed"
    wait_all(back)
    assert trap.trained == each_once("a")


@pytest.mark.parametrize("labels", ["server", "device"])
def test_waves_of_what_is_there_lose_no_step_either(cluster: Cluster, labels: str) -> None:
    """Saved after each step, with one device that leaves and one that dies: each sample counts."""
    config = config_of(cluster, "abc", labels=labels, waves="available", save_every_s=0.0)
    trap = Counted()
    serving = cluster.serve(config, trap=trap).start()
    staying = cluster.start("a")
    dying = cluster.client("c", sentences(ord("c")), DieAt(STEPS + 2)).start()

    leaving_at(1, cluster, "b").start().wait()
    back = cluster.start("b")
    with pytest.raises(Died):
        dying.wait()
    back += cluster.start("c")

    assert serving.wait() == "completed"
    wait_all([*staying, *back])
    again = {step for (_, step), times in trap.trained.items() if times > 1}
    # Whoever leaves after a step may be gone before the others have ended it: they do it again.
    assert again <= {1, STEPS + 2}
    assert trap.trained.keys() == each_once("abc").keys()
    assert [row["samples"] for row in serving.rows[1:]] == [STEPS * 14, STEPS * 14]
