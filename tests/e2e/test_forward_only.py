"""Devices whose blocks are frozen: rank 0 everywhere, no gradient comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, wait_all
from tests.e2e.test_equals_central import SGD, Central, batches_of

SPLIT, BATCH, STEPS = 2, 4, 10


@pytest.mark.parametrize("labels", ["server", "device"])
def test_it_trains_the_upper_blocks_as_one_machine_would(cluster: Cluster, labels: str) -> None:
    """A forward-only device alone: the coordinator's factors are those of PEFT above its split."""
    devices = {"a": DeviceSettings(split=SPLIT, batch_size=BATCH, r=0)}
    config = cluster.config(
        labels=labels,
        rounds=STEPS,
        steps_per_round=1,
        training=SGD,
        devices=devices,
        min_devices=1,
    )
    central = Central(config)  # alone: all threads draw from one source of random numbers
    serving = cluster.serve(config).start()
    clients = cluster.start("a")
    block_of = serving.model.facts.block_of
    lower = {name for name in central.targets if block_of(name) < SPLIT}
    for name, factor in central.factors.items():
        factor.requires_grad_(name.rpartition(".")[0] not in lower)
    start = {name: central.factor(name).copy() for name in central.factors}

    for step in range(STEPS):
        central.step(step, {"a": batches_of("a", BATCH, cluster.model)})
    outcome = serving.wait()
    wait_all(clients)

    assert outcome == "completed"
    assert serving.ledger.totals.keys() == central.targets.keys() - lower
    moved = 0.0
    for name, pair in serving.ledger.pairs[""].items():
        np.testing.assert_allclose(pair.a_RI, central.factor(f"{name}.A"), atol=1e-5)
        np.testing.assert_allclose(pair.b_OR, central.factor(f"{name}.B"), atol=1e-5)
        moved = max(moved, np.abs(pair.b_OR - start[f"{name}.B"]).max())
    assert moved > 1e-2


def test_no_gradient_travels_to_it(cluster: Cluster) -> None:
    """Of two devices alike, the forward-only one receives an answer without a tensor."""
    config = cluster.config(
        labels="server",
        training=SGD,
        default=DeviceSettings(split=SPLIT, batch_size=BATCH, micro_batch=2, codec="float32"),
        devices={"a": DeviceSettings(r=0), "b": DeviceSettings(r=4), "c": DeviceSettings(r=4)},
    )
    serving = cluster.serve(config)
    sent: dict[str, set[tuple[str, ...]]] = {}
    send = serving.gateway.send

    def spy(device: str, message: Any, tensors: Any = ()) -> None:
        if type(message).__name__ == "Gradient":
            sent.setdefault(device, set()).add(tuple(tensors))
        send(device, message, tensors or {})

    serving.gateway.send = spy  # type: ignore[method-assign]
    serving.start()
    clients = cluster.start()
    assert serving.wait() == "completed"
    wait_all(clients)

    assert sent == {"a": {()}, "b": {("grad",)}, "c": {("grad",)}}


def test_its_frozen_blocks_are_what_the_others_have_learned(cluster: Cluster) -> None:
    """It holds no factors of its own; a device beside it alone teaches the blocks they share."""
    training = TrainingConfig(learning_rate=1e-2)
    devices = {
        "a": DeviceSettings(split=SPLIT, r=0, batch_size=BATCH),
        "b": DeviceSettings(split=SPLIT, r=4, batch_size=BATCH),
        "c": DeviceSettings(split=1, r=0, batch_size=BATCH),
    }
    config = cluster.config(training=training, devices=devices, rounds=2)
    serving = cluster.serve(config)
    ledger = serving.ledger
    kept: list[tuple[Any, Any]] = []
    aggregate = ledger.aggregate

    def spy(reports: Any) -> Any:
        before = dict(ledger.pairs["b"])
        result = aggregate(reports)
        kept.append((before, dict(reports["b"].pairs)))
        return result

    ledger.aggregate = spy  # type: ignore[method-assign]
    serving.start()
    clients = cluster.start()
    assert serving.wait() == "completed"
    wait_all(clients)

    assert ledger.pairs["a"] == ledger.pairs["c"] == {}
    block_of = serving.model.facts.block_of
    scale = config.lora.scale("", 4)
    lowest = [name for name in ledger.totals if block_of(name) == 0]
    assert lowest
    for name in lowest:
        changes = [
            after[name].b_OR @ after[name].a_RI - before[name].b_OR @ before[name].a_RI
            for before, after in kept
        ]
        dense = ledger.totals[name].dense()
        np.testing.assert_allclose(dense, scale * sum(changes), atol=1e-5)
        held = ledger.residuals("a", [name])[name].dense()
        np.testing.assert_allclose(held, dense, atol=1e-6)
        assert np.abs(dense).max() > 1e-3
