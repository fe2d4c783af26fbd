"""Waves of what is there teach what gathered waves do, and wait for nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, Serving, products, save_model, wait_all

STEPS = 20
LONG_S = 240.0
# Splits, ranks, batches, numbers of micro-batches and of those under way: all differ.
DEVICES = {
    "a": DeviceSettings(split=1, batch_size=4, micro_batch=1, in_flight=3, r=4),
    "b": DeviceSettings(split=2, batch_size=6, micro_batch=2, in_flight=2, r=2),
    "c": DeviceSettings(split=4, batch_size=3, micro_batch=3, in_flight=1, r=8),
}
SGD = TrainingConfig(
    optimizer="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0
)


def run_with(waves: str, folder: Path, parts: Path, **settings: Any) -> Serving:
    """A whole run of three devices."""
    folder.mkdir()
    cluster = Cluster(folder, save_model("llama", folder / "model"), parts)
    config = cluster.config(
        waves=waves,
        rounds=2,
        steps_per_round=STEPS // 2,
        training=SGD,
        devices=DEVICES,
        **settings,
    )
    try:
        serving = cluster.serve(config).start()
        clients = cluster.start()
        assert serving.wait(LONG_S) == "completed"
        wait_all(clients, LONG_S)
    finally:
        cluster.close()
    return serving


@pytest.mark.parametrize("wave_tokens", [None, 64])
@pytest.mark.parametrize("labels", ["server", "device"])
def test_waves_of_what_is_there_teach_the_same(
    labels: str, wave_tokens: int | None, tmp_path: Path, parts: Path
) -> None:
    """Twenty steps of three devices, cut differently, end within 1e-6 of gathered waves."""
    gathered, available = (
        run_with(waves, tmp_path / waves, parts, labels=labels, wave_tokens=wave_tokens)
        for waves in ("gathered", "available")
    )

    found, expected = (products(run.ledger.state()) for run in (available, gathered))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, rtol=0, err_msg=name)
    assert max(np.abs(total.dense()).max() for total in gathered.ledger.totals.values()) > 1e-3
    for mine, theirs in zip(available.rows, gathered.rows, strict=True):
        assert mine.get("samples") == theirs.get("samples")
        assert mine.get("train_loss", 0.0) == pytest.approx(theirs.get("train_loss", 0.0), abs=1e-6)
