"""The codec `residual` between real devices and a real coordinator: changes, and nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings, ServeConfig
from edge_sdk.client.client import EdgeClient
from edge_sdk.held_states import HeldStates
from tests.e2e.cluster import Cluster, Serving, held_out, wait_all

DEVICES = {
    "a": DeviceSettings(split=1, r=2),
    "b": DeviceSettings(split=3, batch_size=6, micro_batch=2, in_flight=2),
    "c": DeviceSettings(split=4, r=3),
}


def config_of(cluster: Cluster, **settings: object) -> ServeConfig:
    """Four rounds of four steps: every sample comes back at least twice."""
    default = DeviceSettings(split=2, batch_size=6, codec="residual")
    fixed = {"rounds": 4, "steps_per_round": 4, "devices": DEVICES, "default": default}
    return cluster.config(**{**fixed, **settings})


def ended(serving: Serving, clients: list[EdgeClient]) -> Serving:
    """The run after its last round, its devices gone."""
    assert serving.wait() == "completed", serving.trap.notes
    wait_all(clients)
    return serving


def held_of(cluster: Cluster, serving: Serving, name: str) -> tuple[HeldStates, HeldStates]:
    """What a device has written of what it holds, and what its coordinator holds."""
    log = cluster.folder / "state" / "run-1" / name / "held.log"
    return HeldStates(10**9, log), serving.coordinator.run.residuals.of(name)


def num_whole(caplog: pytest.LogCaptureFixture) -> int:
    """How often the coordinator has asked for whole tensors."""
    return sum(record.message.startswith("residual.whole") for record in caplog.records)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_both_sides_hold_the_same(
    cluster: Cluster, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With mixed cuts, both ends hold the same bytes of every sample, and nobody sends again."""
    caplog.set_level("INFO", "edge_sdk.client.steps")
    serving = cluster.serve(config_of(cluster, labels=labels)).start()

    ended(serving, cluster.start(data=held_out(), keep_held=True))

    assert num_whole(caplog) == 0
    for name in "abc":
        ours, theirs = held_of(cluster, serving, name)
        held = [s for s in range(24) if theirs.get(s) is not None]
        assert len(held) == len(theirs) >= 12
        same = [s for s in held if (a := ours.get(s)) and a.mark == theirs.get(s).mark]  # type: ignore[union-attr]
        assert len(same) >= len(held) - 16  # the device has not written the last round


def test_it_learns_what_float32_learns(cluster: Cluster) -> None:
    """The same run in float32 and with residuals ends at the same loss within half a percent."""
    losses = {}
    for codec in ("float32", "residual"):
        default = DeviceSettings(split=2, batch_size=6, codec=codec)  # type: ignore[arg-type]
        config = config_of(cluster, default=default, name=codec)
        state = cluster.folder / f"state-{codec}"
        serving = cluster.serve(config).start()
        ended(serving, cluster.start(data=held_out(), state=state))
        shares = serving.rows[-1]["eval_by_device"].values()
        losses[codec] = float(np.mean([share["loss"] for share in shares]))

    assert losses["residual"] == pytest.approx(losses["float32"], rel=5e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> Serving:
    """The undisturbed run."""
    cluster = Cluster(tmp_path_factory.mktemp("whole"), llama, parts)
    serving = cluster.serve(config_of(cluster)).start()
    return ended(serving, cluster.start(data=held_out()))


@pytest.mark.parametrize("how", ["paused", "crashed", "devices too"])
def test_a_resumed_run_is_the_uninterrupted_one(
    cluster: Cluster, whole: Serving, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped or killed, devices alive or killed too, the run ends in the uninterrupted bits."""
    caplog.set_level("INFO", "edge_sdk.client.steps")
    config = config_of(cluster)

    first = cluster.serve(config)
    first = (first.stop_at(10) if how == "paused" else first.crash_at(10)).start()
    clients = cluster.start(data=held_out(), keep_held=True)
    assert first.wait() == ("paused" if how == "paused" else "crashed")
    if how == "devices too":
        for client in clients:
            client.stop()
        wait_all(clients)
        clients = []
    second = cluster.serve(config).start()
    ended(second, clients or cluster.start(data=held_out(), keep_held=True))

    assert num_whole(caplog) == 0
    assert second.metrics == whole.metrics
    expected = whole.ledger.state()
    for name, value in second.ledger.state().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("who", ["coordinator", "devices"])
def test_what_is_lost_is_sent_again(
    cluster: Cluster, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A side that comes back without what it held costs whole tensors, and no sample."""
    caplog.set_level("INFO", "edge_sdk.client.steps")
    config = config_of(cluster)
    first = cluster.serve(config).crash_at(10).start()
    clients = cluster.start(data=held_out(), keep_held=who == "coordinator")
    assert first.wait() == "crashed"
    if who == "coordinator":
        shutil.rmtree(Path(first.folder.path) / "held")
    if who == "devices":
        for client in clients:
            client.stop()
        wait_all(clients)
        clients = []

    second = cluster.serve(config).start()
    ended(second, clients or cluster.start(data=held_out()))

    assert (num_whole(caplog) > 0) == (who == "coordinator")
    samples = [row.get("samples") for row in second.rows[1:]]
    assert samples == [4 * (6 + 6 + 6)] * 4


def test_auto_is_told_with_the_plan(cluster: Cluster) -> None:
    """Fixed plans measure no link: `auto` is int8 for everybody, on both sides."""
    default, told = DeviceSettings(split=2, batch_size=6, codec="auto"), set()
    serving = cluster.serve(cluster.config(default=default, rounds=1))
    serving.trap.on_step = lambda device, _: told.add(serving.admission.codecs[device])
    serving.start()
    ended(serving, cluster.start())

    assert told == {"int8"}
