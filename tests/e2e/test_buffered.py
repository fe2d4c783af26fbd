"""Rounds without a barrier: nobody waits, and each sample counts once, whatever happens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.buffered import BufferedConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.protocol.messages import StepReport
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import PATIENCE_S, Cluster, Serving, held_out, sentences, wait_all

DEVICES = {
    "a": DeviceSettings(split=1, r=2),
    "b": DeviceSettings(split=3, batch_size=6, micro_batch=2),
    "c": DeviceSettings(split=5, r=3),
}


def config_of(cluster: Cluster, **settings: Any) -> ServeConfig:
    """Four merges of tours of three steps."""
    return cluster.config(rounds=4, **settings)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs of one device."""
    return tmp_path_factory.mktemp("one")


def alone(folder: Path, llama: Path, parts: Path, mode: str, labels: str) -> Serving:
    """A run of one device to its end."""
    cluster = Cluster(folder / f"{mode}-{labels}", llama, parts, ("a",))
    settings = DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="float32")
    config = config_of(
        cluster, round_mode=mode, aggregation="exact", labels=labels, default=settings
    )
    serving = cluster.serve(config).start()
    clients = cluster.start(data=held_out())
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving


@pytest.mark.parametrize("labels", ["server", "device"])
def test_alone_it_is_a_run_with_a_barrier(one: Path, llama: Path, parts: Path, labels: str) -> None:
    """One device and a buffer of one learn, bit for bit, what rounds with a barrier do."""
    for mode in ("synchronous", "buffered"):
        (one / f"{mode}-{labels}").mkdir()

    whole, buffered = (
        alone(one, llama, parts, mode, labels) for mode in ("synchronous", "buffered")
    )

    found, expected = buffered.ledger.state(), whole.ledger.state()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    for mine, theirs in zip(buffered.rows, whole.rows, strict=True):
        assert {k: v for k, v in mine.items() if k not in ("updates", "served")} == theirs


@pytest.mark.parametrize("labels", ["server", "device"])
def test_every_sample_is_merged_once(cluster: Cluster, labels: str) -> None:
    """The updates of each merge, and the samples in its row, are those that devices trained on."""
    config = config_of(
        cluster,
        round_mode="buffered",
        aggregation="exact",
        buffered=BufferedConfig(size=2),
        devices=DEVICES,
        labels=labels,
    )

    serving = cluster.serve(config).start()
    clients = cluster.start(data=held_out())
    assert serving.wait() == "completed"
    wait_all(clients)

    samples = {name: 3 * serving.config.settings(name).batch_size for name in "abc"}
    for row in serving.rows[1:]:
        assert sum(map(len, row["updates"].values())) >= 2
        assert row["samples"] == sum(samples[n] * len(ages) for n, ages in row["updates"].items())
    assert serving.state.round == 4
    assert {e["event"] for e in serving.events} >= {"tours.merged"}


def learned(serving: Serving) -> tuple[bytes, dict[str, np.ndarray]]:
    """What a run has measured and learned."""
    return serving.metrics, serving.ledger.state()


@pytest.mark.parametrize("ends", ["crash", "stop"])
def test_what_was_interrupted_goes_on(cluster: Cluster, one: Path, ends: str) -> None:
    """Killed or stopped in the middle of a tour, a run goes on as if nothing had happened."""
    folder = one / ends
    folder.mkdir()
    alone = Cluster(folder, cluster.model, cluster.parts, ("a",))
    settings = DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="float32")
    training = TrainingConfig(learning_rate=1e-2, optimizer="adamw")
    common: dict[str, Any] = {
        "round_mode": "buffered",
        "aggregation": "exact",
        "default": settings,
        "training": training,
    }
    whole = alone.serve(config_of(alone, **common, name="whole")).start()
    clients = alone.start(data=held_out())
    assert whole.wait() == "completed"
    wait_all(clients)

    config = config_of(alone, **common, name="cut")
    serving = alone.serve(config)
    (serving.crash_at if ends == "crash" else serving.stop_at)(7).start()
    clients = alone.start(data=held_out())
    assert serving.wait() == {"crash": "crashed", "stop": "paused"}[ends]
    serving = alone.serve(config).start()
    assert serving.wait() == "completed"
    wait_all(clients)

    (metrics, ledger), (expected, theirs) = learned(serving), learned(whole)
    assert metrics == expected
    for name, value in ledger.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


class Leaving(Callback):
    """Ends its device after a step."""

    client: EdgeClient | None = None

    def on_step_end(self, report: StepReport) -> None:
        """Leave in the middle of the third tour."""
        if report.stamp.step == 7 and self.client is not None:
            self.client.stop()


def test_a_device_that_comes_back_repeats_its_tour(cluster: Cluster, one: Path) -> None:
    """Steps that the coordinator has learned from before the device left move it only once."""
    folder = one / "device"
    folder.mkdir()
    alone, leaving = Cluster(folder, cluster.model, cluster.parts, ("a",)), Leaving()
    settings = DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="float32")
    serving = alone.serve(
        config_of(alone, round_mode="buffered", aggregation="exact", default=settings)
    ).start()
    leaving.client = alone.client("a", sentences(ord("a")), leaving)

    assert leaving.client.start().wait(PATIENCE_S)
    clients = alone.start()
    assert serving.wait() == "completed"
    wait_all(clients)

    assert [(row["samples"], row["served"]) for row in serving.rows[1:]] == [(12, 12)] * 4


class Slow(Callback):
    """Takes its time after each step."""

    def on_step_end(self, report: StepReport) -> None:
        """Do nothing for a while."""
        time.sleep(0.5)


def test_who_is_too_far_behind_begins_anew(cluster: Cluster) -> None:
    """A device that too many merges have overtaken is told to begin anew, and the run says so."""
    bound = BufferedConfig(size=1, max_staleness=2)
    config = cluster.config(rounds=12, round_mode="buffered", aggregation="exact", buffered=bound)
    serving = cluster.serve(config).start()

    clients = [
        cluster.client(n, sentences(ord(n)), Slow() if n == "c" else None).start() for n in "abc"
    ]
    assert serving.wait() == "completed"
    wait_all(clients)

    assert any(row.get("dropped") == ["c"] for row in serving.rows)
    assert "c" in {e["device"] for e in serving.events if e["event"] == "work.dropped"}
    ages = [age for row in serving.rows[1:] for own in row["updates"].values() for age in own]
    assert max(ages) <= bound.max_staleness + 1


def test_a_run_of_several_is_stopped_and_goes_on(cluster: Cluster) -> None:
    """What was in the buffer and on its way when a run was stopped is merged when it goes on."""
    config = config_of(
        cluster, round_mode="buffered", aggregation="exact", devices=DEVICES, labels="device"
    )
    serving = cluster.serve(config).stop_at(4).start()
    clients = cluster.start()
    assert serving.wait() == "paused"
    tours = {name: (t.begin, t.end) for name, t in serving.state.tours.items()}
    buffered = serving.coordinator.learned.buffer.updates

    resumed = cluster.serve(config)
    again = resumed.state

    assert {n: (t.begin, t.end) for n, t in again.tours.items()} == tours
    kept = resumed.coordinator.learned.buffer.updates
    assert [(u.device, u.version) for u in kept] == [(u.device, u.version) for u in buffered]
    resumed.start()
    assert resumed.wait() == "completed"
    wait_all(clients)
    samples = {name: 3 * config.settings(name).batch_size for name in "abc"}
    for row in resumed.rows[1:]:
        assert row["samples"] == sum(samples[n] * len(ages) for n, ages in row["updates"].items())
