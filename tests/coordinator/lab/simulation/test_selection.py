"""Rounds of devices that are drawn: what those learn who are in, and what the others cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest

from coordinator.config.exchange import ExchangeConfig
from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.result import SimulationResult
from coordinator.lab.simulation.run import simulate
from coordinator.results.history import RunHistory
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import save_model, sentences, write_rows

NAMES = "abcdef"
# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make configs of devices with files of their own."""
    folder = tmp_path_factory.mktemp("selection")
    llama = save_model("llama", folder / "model")
    dev, numbers = write_rows(folder / "dev.jsonl", sentences(2, 6)), count()
    files = {n: write_rows(folder / f"{n}.jsonl", sentences(ord(n), 12)) for n in NAMES}

    def config(names: Sequence[str] = NAMES, **settings: Any) -> SimulationConfig:
        chosen = {
            "model": str(llama),
            "runs": folder,
            "name": f"run-{'x' * next(numbers)}",
            "rounds": 3,
            "steps_per_round": 2,
            "waves": "gathered",
            "default": DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="float32"),
            "lora": LoraConfig(r=4, lora_alpha=8),
            "training": TrainingConfig(learning_rate=1e-2),
            "evaluation": EvaluationConfig(data=DataConfig(path=str(dev)), on_devices=False),
            "device": "cpu",
            "report": False,
            **settings,
        }
        devices = {name: SimulatedDeviceConfig(data=str(files[name])) for name in names}
        fleet = FleetConfig(devices=devices, cache=folder / "parts")
        return SimulationConfig(**{"simulation": fleet, **chosen})

    return config


def drawn(result: SimulationResult) -> list[list[str]]:
    """Who was in each round."""
    events = RunHistory(result.folder).events
    return [row["devices"] for row in events if row["event"] == "round.started"]


def learned(result: SimulationResult) -> Mapping[str, np.ndarray]:
    """What the run has learned, by the last checkpoint."""
    arrays = result.folder.load_checkpoint().arrays["ledger"]
    return {name: array for name, array in arrays.items() if name.startswith("total:")}


def metrics(result: SimulationResult) -> bytes:
    """The run's rows, to the last bit."""
    return (result.folder.path / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_round_of_drawn_devices_is_that_of_a_run_of_only_these(make: Any, labels: Any) -> None:
    """Those who are not drawn change no bit of what the round teaches."""
    some = simulate(make(devices_per_round=2, rounds=1, labels=labels), Watchers())
    (names,) = drawn(some)
    alone = simulate(make(names, rounds=1, labels=labels), Watchers())

    assert len(names) == 2
    assert metrics(some) == metrics(alone)
    found, expected = learned(some), learned(alone)
    assert found.keys() == expected.keys() != set()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("per_round", [len(NAMES), 50])
def test_a_round_with_room_for_all_is_as_it_was(make: Any, per_round: int) -> None:
    """Where everybody is drawn, the run is the one that draws nobody, to the last bit."""
    assert metrics(simulate(make(devices_per_round=per_round), Watchers())) == metrics(
        simulate(make(), Watchers())
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"waves": "available"},
        {"exchange": ExchangeConfig(downlink="budget", codec="bfloat16")},
        {"default": DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="residual")},
        {"planning": PlanningConfig(split="armsc", ranks="rngwp", importance_every=1)},
    ],
    ids=["available", "budget", "residual", "planned"],
)
def test_drawn_rounds_are_the_same_every_time(make: Any, settings: dict[str, Any]) -> None:
    """Equal runs draw and learn the same, and devices come back after rounds without them."""
    wanted = {"devices_per_round": 2, "rounds": 5, **settings}
    first, again = (simulate(make(**wanted), Watchers()) for _ in range(2))

    assert first.outcome == "completed"
    assert metrics(first) == metrics(again)
    assert drawn(first) == drawn(again)
    assert all(len(names) == 2 for names in drawn(first))
    rounds = {name: [n for n, d in enumerate(drawn(first)) if name in d] for name in NAMES}
    assert any(after > before + 1 for r in rounds.values() for before, after in pairwise(r))


@pytest.mark.parametrize("waves", ["gathered", "available"])
def test_who_is_to_leave_is_gone_then_whether_it_is_drawn_or_not(make: Any, waves: Any) -> None:
    """From the step on after which it leaves no device is drawn any more; the others go on."""
    wanted = {"devices_per_round": 2, "rounds": 6, "waves": waves}
    config = make(**wanted)
    whole = drawn(simulate(config, Watchers()))
    idle = next(name for name in NAMES if name not in whole[1] and name in {*whole[2], *whole[3]})
    devices = dict(config.simulation.devices)
    for name in (whole[1][0], idle):
        devices[name] = replace(devices[name], leaves_after_step=3)  # the first of round 1
    config = make(**wanted, simulation=replace(config.simulation, devices=devices))

    left = simulate(config, Watchers())

    assert left.outcome == "completed"
    found = drawn(left)
    assert found[:2] == whole[:2]
    assert not {whole[1][0], idle} & {name for names in found[2:] for name in names}
    assert all(len(names) == 2 for names in found)
