"""Simulated devices with frozen blocks send a sample once: later it takes no modelled time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.config.replay import ReplayConfig
from coordinator.config.run import DeviceSettings
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.result import SimulationResult
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from tests.e2e.cluster import save_model, sentences, write_rows

# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS, BATCH, EPOCHS = 16, 4, 3


def run(folder: Path, name: str, **settings: Any) -> SimulationResult:
    """Simulate three epochs of two frozen devices."""
    fleet = FleetConfig(
        devices={"n": SimulatedDeviceConfig(count=2)},
        data=DataConfig(path=str(folder / "train.jsonl")),
        cache=folder / "parts",
    )
    config = SimulationConfig(
        model=str(folder / "llama"),
        runs=folder,
        name=name,
        rounds=EPOCHS,
        steps_per_round=ROWS // BATCH,
        labels="server",
        default=DeviceSettings(split=2, batch_size=BATCH, micro_batch=1, r=0, codec="float32"),
        lora=LoraConfig(r=4),
        device="cpu",
        waves="gathered",
        simulation=fleet,
        **settings,
    )
    return simulate(config, Watchers())


def test_later_epochs_cost_neither_bytes_nor_time(tmp_path: Path) -> None:
    """What is learned is the same to the bit; the clock shows what two epochs of three save."""
    save_model("llama", tmp_path / "llama")
    write_rows(tmp_path / "train.jsonl", sentences(1, 2 * ROWS))
    plain = run(tmp_path, "plain")

    kept = run(tmp_path, "kept", replay=ReplayConfig(when="auto"))

    assert [row.metrics.get("replayed", 0) for row in kept.rounds] == [0, 0, 2 * ROWS, 2 * ROWS]
    losses = [[row.metrics.get("train_loss") for row in r.rounds] for r in (plain, kept)]
    assert losses[0] == losses[1]
    adapters = [(r.folder.path / "adapter" / "adapter_model.safetensors") for r in (plain, kept)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert kept.rounds[-1].bytes_up < plain.rounds[-1].bytes_up / 2
    for before, now in zip(plain.rounds[2:], kept.rounds[2:], strict=True):
        for device, clock in now.clock["devices"].items():
            assert clock["compute_s"] == 0.0
            assert before.clock["devices"][device]["compute_s"] > 0.0
