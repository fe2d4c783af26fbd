"""Boards and links as data, and the machines made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.lab.simulation.boards import GIB, Board, Connection, Scale, catalogue
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig
from coordinator.lab.simulation.data import deal, own_data
from coordinator.lab.simulation.fleet import make_fleet
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError, DataError
from profiler.profile import problems
from tests.e2e.cluster import write_rows

BOARD = Board(memory_gib=8, system_gib=2, tflops=10, watts=20)
LINK = Connection(down_mbit=80, up_mbit=8, rtt_ms=50)


def fleet_config(**settings: Any) -> FleetConfig:
    """Two devices on a board of their own."""
    settings = {
        "devices": {"a": SimulatedDeviceConfig(board="mine", link="mine", count=2)},
        "boards": {"mine": BOARD},
        "links": {"mine": LINK},
        "utilisation": 0.5,
        **settings,
    }
    return FleetConfig(**settings)


def rows_of(path: Path, count: int = 23) -> DataConfig:
    """A file of texts, each another and longer than the one before."""
    write_rows(path, [{"text": "x" * (n + 1)} for n in range(count)])
    return DataConfig(path=str(path))


def test_every_board_makes_a_profile_that_a_coordinator_accepts() -> None:
    """The boards and links that come with the package are complete and sane."""
    known = catalogue()
    devices = {name: SimulatedDeviceConfig(board=name, link="3g") for name in known.boards}
    devices |= {f"on-{link}": SimulatedDeviceConfig(link=link) for link in known.links}

    fleet = make_fleet(FleetConfig(devices=devices), PlanningConfig())

    assert {name: problems(profile) for name, profile in fleet.profiles.items()} == {
        name: [] for name in devices
    }
    assert known.boards["orin-nano-8gb"].tflops == 10.2
    assert known.links["4g-good"] == Connection(down_mbit=40, up_mbit=10, rtt_ms=55)


def test_a_machine_is_its_board_at_the_stated_utilisation() -> None:
    """Speed is peak times utilisation, memory is what the system leaves, rates are in bytes."""
    fleet = make_fleet(fleet_config(overhead_bytes=5e8), PlanningConfig())

    profile, machine = fleet.profiles["a-1"], fleet.machines["a-1"]
    assert list(fleet.machines) == ["a-0", "a-1"]
    assert (profile.memory_bytes, profile.total_memory_bytes) == (6 * GIB, 8 * GIB)
    assert (profile.overhead_bytes, profile.flops_per_s) == (5e8, 5e12)
    assert (profile.up_bytes_per_s, profile.down_bytes_per_s) == (1e6, 1e7)
    assert (profile.round_trip_s, machine.watts) == (0.05, 20)
    assert (machine.flops_per_s, machine.up_bytes_per_s) == (5e12, 1e6)


def test_a_scaled_fleet_is_slower_and_smaller_by_the_same_factors() -> None:
    """Every time and every share of memory is as if the large model itself were trained."""
    scale = Scale(memory=10, flops=20, bytes=4)
    plain = make_fleet(fleet_config(), PlanningConfig())

    scaled = make_fleet(fleet_config(scale=scale), PlanningConfig())

    before, after = plain.profiles["a-0"], scaled.profiles["a-0"]
    assert before.memory_bytes == pytest.approx(10 * (after.memory_bytes or 0))
    assert before.overhead_bytes == pytest.approx(10 * (after.overhead_bytes or 0))
    assert before.flops_per_s == pytest.approx(20 * (after.flops_per_s or 0))
    assert before.up_bytes_per_s == pytest.approx(4 * (after.up_bytes_per_s or 0))
    assert before.round_trip_s == after.round_trip_s
    assert plain.coordinator.flops_per_s == pytest.approx(20 * scaled.coordinator.flops_per_s)
    assert plain.coordinator_bytes == pytest.approx(10 * scaled.coordinator_bytes)


def test_settings_of_single_machines_win() -> None:
    """A device's memory and speed, and the coordinator's of `planning`, replace the boards'."""
    own = SimulatedDeviceConfig(board="mine", link="mine", memory_bytes=1e9, flops_per_s=3e12)
    planning = PlanningConfig(server_memory_bytes=7e9, server_flops_per_s=9e12)

    fleet = make_fleet(fleet_config(devices={"a": own}, scale=Scale(flops=2)), planning)

    assert (fleet.profiles["a"].memory_bytes, fleet.machines["a"].flops_per_s) == (1e9, 1.5e12)
    assert (fleet.coordinator_bytes, fleet.coordinator.flops_per_s) == (7e9, 9e12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"devices": {"a": SimulatedDeviceConfig(board="oring")}},
            "simulation.devices.a.board: 'oring'",
        ),
        ({"devices": {"a": SimulatedDeviceConfig(link="6g")}}, "simulation.devices.a.link: '6g'"),
        ({"coordinator": "toaster"}, "simulation.coordinator: 'toaster'"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_there_are(
    settings: dict[str, Any], words: str
) -> None:
    """The error names the key and lists the choice."""
    with pytest.raises(ConfigError, match=words + " is unknown; there are "):
        make_fleet(fleet_config(**settings), PlanningConfig())


@pytest.mark.parametrize(
    "facts", [{"memory_gib": 0}, {"tflops": -1}, {"system_gib": 8}, {"watts": float("nan")}]
)
def test_impossible_boards_are_refused(facts: dict[str, float]) -> None:
    """A board has some memory, speed and power."""
    with pytest.raises(ValueError, match=next(iter(facts))):
        replace(BOARD, **facts)


@pytest.mark.parametrize(
    ("names", "words"),
    [({"a": 2, "a-1": 1}, "two are named 'a-1'"), ({"../a": 1}, "'../a' is no name")],
)
def test_a_name_stands_for_one_device(names: dict[str, int], words: str) -> None:
    """Names that counting makes must not be somebody else's, and all must be those of devices."""
    devices = {name: SimulatedDeviceConfig(count=count) for name, count in names.items()}

    with pytest.raises(ValueError, match=words):
        fleet_config(devices=devices)


@pytest.mark.parametrize("shards", ["contiguous", "iid", "dirichlet"])
def test_every_row_is_dealt_out_once(tmp_path: Path, shards: Any) -> None:
    """Nothing is lost, nothing is given twice, and the seed alone decides."""
    config = fleet_config(data=rows_of(tmp_path / "train.jsonl"), shards=shards)
    devices = {name: SimulatedDeviceConfig() for name in "abc"}

    dealt, again = deal(config, devices, 5), deal(config, devices, 5)

    texts = sorted(row["text"] for rows in dealt.values() for row in rows)
    assert texts == sorted("x" * (n + 1) for n in range(23))
    assert dealt == again
    assert all(dealt[name] for name in "abc")
    if shards != "contiguous":
        assert dealt != deal(config, devices, 6)


def test_dirichlet_goes_by_the_label(tmp_path: Path) -> None:
    """With a tiny alpha each class sits on one device."""
    rows = [{"text": str(n), "label": "ab"[n % 2]} for n in range(40)]
    data = DataConfig(path=str(write_rows(tmp_path / "train.jsonl", rows)), labels=("a", "b"))
    config = fleet_config(data=data, shards="dirichlet", alpha=1e-3)

    dealt = deal(config, {name: SimulatedDeviceConfig() for name in "xyz"}, 0)

    holders = {label: {n for n, rows in dealt.items() for r in rows if r["label"] == label}
               for label in "ab"}  # fmt: skip
    counts = np.array([len(rows) for rows in dealt.values()])
    assert all(len(names) <= 2 for names in holders.values())  # an empty shard is given one row
    assert counts.sum() == 40


def test_a_device_with_a_file_gets_no_share(tmp_path: Path) -> None:
    """Its own file counts for it alone, and is read as the shared one is."""
    data = replace(rows_of(tmp_path / "train.jsonl"), limit=10, append_eos=False)
    config = fleet_config(data=data)
    devices = {"a": SimulatedDeviceConfig(), "b": SimulatedDeviceConfig(data="b.jsonl")}

    dealt = deal(config, devices, 0)

    assert list(dealt) == ["a"]
    assert len(dealt["a"]) == 10
    assert own_data(config, devices["b"]) == replace(data, path="b.jsonl")
    assert own_data(config, devices["a"]) == replace(data, path=None, limit=None)


def test_bad_training_data_is_refused_with_its_line(tmp_path: Path) -> None:
    """No path, too few rows or a malformed line: one clear sentence each."""
    devices = {name: SimulatedDeviceConfig() for name in "abc"}
    two = rows_of(tmp_path / "two.jsonl", 2)
    bad = DataConfig(path=str(write_rows(tmp_path / "bad.jsonl", [{"text": "x"}, {"text": 1}])))

    with pytest.raises(ConfigError, match=r"simulation\.data\.path"):
        deal(fleet_config(), devices, 0)
    with pytest.raises(ConfigError, match="2 rows for 3 devices"):
        deal(fleet_config(data=two), devices, 0)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: text is int"):
        deal(fleet_config(data=bad), devices, 0)


def test_skipped_rows_are_dealt_to_nobody(tmp_path: Path) -> None:
    """With `bad_rows: skip` the devices get the good rows, and a limit counts those."""
    rows: list[dict[str, Any]] = [{"text": "a"}, {"text": 1}, {"text": "b"}, {}, {"text": "c"}]
    path = str(write_rows(tmp_path / "bad.jsonl", [*rows, {"text": "d"}]))
    data = DataConfig(path=path, bad_rows="skip", limit=3)
    devices = {name: SimulatedDeviceConfig() for name in "xy"}

    dealt = deal(fleet_config(data=data), devices, 0)

    assert sorted(row["text"] for rows in dealt.values() for row in rows) == ["a", "b", "c"]
