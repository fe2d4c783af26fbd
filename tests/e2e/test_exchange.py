"""Runs that tell less than everything go on, after any stop, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.config.exchange import ExchangeConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from edge_sdk.data.rows import DataConfig
from tests.e2e.cluster import (
    PATIENCE_S,
    Cluster,
    held_out,
    save_model,
    sentences,
    wait_all,
    write_rows,
)
from tests.e2e.test_resume import Whole, complete, leaving_at, same
from tests.runtimes import BACKENDS

DEVICES = {
    "a": DeviceSettings(split=1, r=2),
    "b": DeviceSettings(split=3, batch_size=6, micro_batch=2),
    "c": DeviceSettings(split=4, r=3),
}
BUDGET = ExchangeConfig(downlink="budget", rank=2, codec="int8")


def config_of(
    cluster: Cluster, rule: str, exchange: ExchangeConfig = BUDGET, **settings: Any
) -> ServeConfig:
    """Four rounds of two steps, in which devices lag."""
    shard = write_rows(cluster.folder / "dev.jsonl", sentences(9, 6))
    evaluation = EvaluationConfig(data=DataConfig(path=str(shard)))
    return cluster.config(
        **{"devices": DEVICES, "evaluation": evaluation, "rounds": 4, "steps_per_round": 2}
        | settings,
        aggregation=rule,
        exchange=exchange,
    )


@pytest.fixture(scope="module", params=["fedex", "exact"])
def rule(request: pytest.FixtureRequest) -> str:
    """A rule under which devices may be told less than everything."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path, rule: str) -> Whole:
    """The undisturbed run."""
    cluster = Cluster(tmp_path_factory.mktemp("whole"), llama, parts)
    return complete(cluster, config_of(cluster, rule))


@pytest.fixture
def experts(tmp_path: Path, parts: Path) -> Iterator[Cluster]:
    """The same around a mixture of experts."""
    made = Cluster(tmp_path, save_model("mixtral", tmp_path / "model"), parts)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kind", "backend"), [("experts", "torch"), *(("cluster", name) for name in BACKENDS)]
)
def test_both_sides_know_the_same(kind: str, backend: str, rule: str, request: Any) -> None:
    """At the end of a run an account is, bit for bit, what its device has, whatever computes it."""
    cluster: Cluster = request.getfixturevalue(kind)
    serving = cluster.serve(config_of(cluster, rule, rounds=3)).start()
    clients = cluster.start("a", "c", data=held_out())
    clients += cluster.start("b", data=held_out(), backend=backend)

    assert serving.wait(6 * PATIENCE_S) == "completed"

    wait_all(clients)
    ledger = serving.ledger.state()
    lags = serving.rows[-1]["lag_by_device"]
    assert lags.keys() == {"a", "b", "c"}
    assert all(0.001 < lag < 1.0 for lag in lags.values())
    for name in ("a", "b", "c"):
        (file,) = (cluster.folder / "state" / "run-1" / name).glob("step-000006-*.safetensors")
        device = load_file(file)
        given = {key: value for key, value in ledger.items() if key.startswith(f"given:{name}:")}
        assert given
        for key, value in given.items():
            on_device = device[key.replace(f"given:{name}:", "received:")]
            np.testing.assert_array_equal(on_device, value, err_msg=key)
        for key in (key for key in device if key.startswith("known:")):
            np.testing.assert_array_equal(
                device[key], ledger[key.replace("known:", f"pair:{name}:")], err_msg=key
            )


def test_a_frozen_device_is_given_what_others_learn(cluster: Cluster, rule: str) -> None:
    """A device that computes forward only has an account as well, without factors of its own."""
    devices = {**DEVICES, "b": DeviceSettings(split=3, batch_size=6, micro_batch=2, r=0)}
    serving = cluster.serve(config_of(cluster, rule, devices=devices)).start()
    clients = cluster.start(data=held_out())

    assert serving.wait() == "completed"

    wait_all(clients)
    (file,) = (cluster.folder / "state" / "run-1" / "b").glob("step-000008-*.safetensors")
    device, ledger = load_file(file), serving.ledger.state()
    given = [key for key in device if key.startswith("received:")]
    assert given
    for key in given:
        np.testing.assert_array_equal(device[key], ledger[key.replace("received:", "given:b:")])
        np.testing.assert_array_equal(device[key], device[key.replace("received:", "residual:")])


@pytest.mark.parametrize(("step", "restarts"), [(3, False), (4, True), (7, True)])
def test_a_stopped_run_goes_on(
    cluster: Cluster, rule: str, whole: Whole, step: int, restarts: bool
) -> None:
    """Stopped in a round or between two, with its devices or without: every bit is the same."""
    config = config_of(cluster, rule)
    stopped = cluster.serve(config).stop_at(step).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"
    if restarts:
        for client in clients:
            client.stop()
        wait_all(clients)

    resumed = cluster.serve(config).start()
    if restarts:
        clients = cluster.start(data=held_out())

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, whole)


def test_a_killed_coordinator_goes_on(cluster: Cluster, rule: str, whole: Whole) -> None:
    """Accounts go back to the last checkpoint, as the devices do."""
    config = config_of(cluster, rule)
    killed = cluster.serve(config).crash_at(5).start()
    clients = cluster.start(data=held_out())
    assert killed.wait() == "crashed"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, whole)


def test_a_device_that_leaves_after_its_upload_comes_back(
    cluster: Cluster, rule: str, whole: Whole
) -> None:
    """What rounding has kept from the coordinator is on the device's own disk."""
    config = config_of(cluster, rule)
    serving = cluster.serve(config).start()
    staying = cluster.start("a", "c", data=held_out())
    leaving = leaving_at(4, cluster, "b", sentences(ord("b")), data=held_out()).start()
    leaving.wait()
    back = cluster.start("b", data=held_out())

    assert serving.wait() == "completed"

    wait_all([*staying, *back])
    same(serving, whole)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_full_changes_in_float32_numbers_learn_the_same(
    cluster: Cluster, rule: str, labels: Any
) -> None:
    """With room for all ranks in float32, a budget is `full` up to rounding."""
    plain = config_of(cluster, rule, ExchangeConfig(), labels=labels, name="plain")
    roomy = ExchangeConfig(downlink="budget", rank=64)
    full = complete(cluster, plain, state=cluster.folder / "plain-state")

    found = complete(cluster, replace(plain, name="roomy", exchange=roomy))

    kind = "pair:" if rule == "exact" else "shared:"
    factors = {name: value for name, value in full.ledger.items() if name.startswith(kind)}
    assert factors
    for name, value in factors.items():
        assert found.ledger[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
