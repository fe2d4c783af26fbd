"""Without a barrier the modelled clock decides who comes first, and a slow device costs little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.result import SimulationResult
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import save_model, sentences, write_rows

# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS, BATCH = 3, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(tmp_path: Path, llama: Path) -> Any:
    """Simulate two fast devices and one that is ten times as slow."""
    train = write_rows(tmp_path / "train.jsonl", sentences(1, 30))
    dev = write_rows(tmp_path / "dev.jsonl", sentences(2, 6))

    def go(name: str, mode: Any, **settings: Any) -> SimulationResult:
        speeds = {"a": 1e7, "b": 1e7, "slow": 1e6}
        config = SimulationConfig(
            model=str(llama),
            runs=tmp_path / "runs",
            name=name,
            rounds=6,
            steps_per_round=STEPS,
            round_mode=mode,
            aggregation="exact",
            default=DeviceSettings(split=2, batch_size=BATCH, micro_batch=2, codec="float32"),
            lora=LoraConfig(r=4, lora_alpha=8),
            training=TrainingConfig(learning_rate=1e-2),
            evaluation=EvaluationConfig(data=DataConfig(path=str(dev)), on_devices=False),
            device="cpu",
            simulation=FleetConfig(
                devices={
                    n: SimulatedDeviceConfig(link="lan-1g", flops_per_s=speed)
                    for n, speed in speeds.items()
                },
                data=DataConfig(path=str(train)),
                cache=tmp_path / "parts",
            ),
            **settings,
        )
        return simulate(config, Watchers())

    return go


def read(result: SimulationResult, name: str) -> bytes:
    """A file of a run."""
    return (result.folder.path / name).read_bytes()


@pytest.mark.parametrize("labels", ["server", "device"])
def test_equal_simulations_are_equal(run: Any, labels: str) -> None:
    """Two simulations without a barrier write the same metrics and the same times."""
    one, two = (run(name, "buffered", labels=labels) for name in ("one", "two"))

    for name in ("metrics.jsonl", "clock.jsonl"):
        assert read(one, name) == read(two, name)


def test_a_slow_device_costs_the_others_little(run: Any) -> None:
    """Equally many samples are merged in a third of the time, and what is slow counts less."""
    waited, buffered = run("waited", "synchronous"), run("buffered", "buffered")

    assert buffered.rounds[-1].samples == waited.rounds[-1].samples
    assert buffered.rounds[-1].seconds < waited.rounds[-1].seconds / 3
    ages = [row["updates"] for row in buffered.folder.rows("metrics.jsonl")[1:]]
    assert all(max(own) <= 1 for row in ages for n, own in row.items() if n != "slow")
    assert max(age for row in ages for own in row.values() for age in own) > 1
    merged = sum(len(own) for row in ages for own in row.values())
    assert merged * STEPS * BATCH == buffered.rounds[-1].samples
