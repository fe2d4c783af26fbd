"""Who is disturbed, and what that changes: drawn once for all methods, told as a difference."""

from __future__ import annotations

import csv
import io

from coordinator.lab.comparison.config import CompareSection
from coordinator.lab.comparison.robustness import disturb, robustness_table
from coordinator.lab.simulation.config import (
    FleetConfig,
    SimulatedDeviceConfig,
    SimulationConfig,
)
from tests.coordinator.lab.comparison.made_cells import make_cell

WANTED = CompareSection(dropout_share=0.4, straggler_factor=3.0)


def config(num_devices: int, rounds: int = 6) -> SimulationConfig:
    """A run of so many devices, three steps a round."""
    devices = {f"d{i}": SimulatedDeviceConfig() for i in range(num_devices)}
    fleet = FleetConfig(devices=devices)
    return SimulationConfig(model="m", rounds=rounds, steps_per_round=3, simulation=fleet)


def test_the_same_devices_are_disturbed_in_every_method() -> None:
    """As many as the share says, by the seed alone, in the middle third of the run."""
    run, names = disturb(config(5), "dropouts", WANTED, 0)
    steps = {n: d.leaves_after_step for n, d in run.simulation.devices.items()}

    assert len(names) == 2
    assert {n for n, step in steps.items() if step is not None} == set(names)
    assert all(6 <= (steps[name] or 0) <= 12 for name in names)
    assert disturb(config(5), "dropouts", WANTED, 0) == (run, names)
    drawn = {disturb(config(5), "dropouts", WANTED, seed)[1] for seed in range(8)}
    assert len(drawn) > 1
    slow, late = disturb(config(5), "stragglers", WANTED, 0)
    assert [slow.simulation.devices[name].slowdown for name in late] == [3.0]


def test_somebody_always_stays() -> None:
    """A single device cannot leave; of two, one does, in the shortest run too."""
    alone, _ = disturb(config(1), "dropouts", WANTED, 0)
    pair, names = disturb(config(2, rounds=1), "dropouts", WANTED, 0)

    assert alone == config(1)
    assert len(names) == 1
    assert (pair.simulation.devices[names[0]].leaves_after_step or 0) >= 1


def test_changes_are_to_the_undisturbed_run() -> None:
    """Loss, score and time, at the rate that the method keeps; no table where nothing was done."""
    cells = [
        make_cell([4.0, 2.0]),
        make_cell([4.0, 3.0], rate=0.2),
        make_cell([4.0, 2.5, 2.25], disturbance="dropouts", disturbed=("a", "b")),
    ]

    table = robustness_table(cells, WANTED, is_classifier=True)

    assert table is not None
    (row,) = csv.DictReader(io.StringIO(table.csv()))
    assert (row["loss_change"], row["accuracy_change"], row["time_change"]) == (
        "0.25",
        "0.0",
        "1.0",
    )
    assert row["disturbed"] == "a, b"
    assert robustness_table(cells[:2], WANTED, is_classifier=True) is None
