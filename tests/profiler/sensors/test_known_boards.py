"""Whole boards: every reading that is there, its value, its source, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profiler.sensors.load import CpuTimes
from profiler.sensors.overview import Known, overview
from profiler.sensors.readings import NOT_KNOWN
from tests.boards import BOARDS, Standing, build
from tests.boards.nvml import lost

# Ticks before those in the trees' /proc/stat, which have 10000, of which 2500 were busy.
BEFORE = CpuTimes(busy=1000, total=8000)


def known(standing: Standing) -> dict[str, Known]:
    """Every reading of the board by name."""
    groups = overview(standing.sources, BEFORE)
    readings = {name: one for group in groups.values() for name, one in group.items()}
    if "cores" not in standing.board.values:
        del readings["cores"]  # no quota: the affinity is that of the machine under the test
    return readings


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_tells_exactly_what_it_can(tmp_path: Path, name: str) -> None:
    """All values that the board has are read, in base units, and all others are None."""
    standing = build(name, tmp_path)

    values = {name: one.value for name, one in known(standing).items() if one.value is not None}

    assert values == pytest.approx(standing.board.values)
    assert {type(value) for value in values.values()} <= {str, bool, int, float}


@pytest.mark.parametrize("name", BOARDS)
def test_a_value_says_where_it_comes_from(tmp_path: Path, name: str) -> None:
    """Each metric has the first source that works on this board; unknown has none."""
    standing = build(name, tmp_path)
    readings = known(standing)

    assert {n: readings[n].source for n in standing.board.sources} == standing.board.sources
    assert all((one.value is None) == (one.source == NOT_KNOWN) for one in readings.values())


@pytest.mark.parametrize(
    ("name", "estimated"),
    [
        ("orin_nano_jp6", False),  # the rail of the whole module
        ("agx_orin_jp5", True),  # no such rail: a sum
        ("raspberry_pi_5", True),  # without what hangs on its 5 V
        ("rtx_laptop", True),  # without processor and display
    ],
)
def test_a_part_is_not_sold_as_the_whole(tmp_path: Path, name: str, estimated: bool) -> None:
    """Power of a part of the board is marked as an estimate for the board."""
    reading: Any = known(build(name, tmp_path))["power"]

    assert reading.estimated is estimated


def test_a_gpu_that_is_lost_leaves_the_rest(tmp_path: Path) -> None:
    """When the GPU falls off the bus its readings become unknown, and no others do."""
    whole = known(build("rtx_laptop", tmp_path / "whole"))
    rest = known(build("rtx_laptop", tmp_path / "rest", library=lost()))

    gone = {name for name in whole if whole[name].value is not None} - {
        name for name in rest if rest[name].value is not None
    }

    assert gone == {
        *("gpu", "compute_capability", "unified_memory", "gpu_load", "gpu_clock", "gpu_clock_max"),
        *("gpu_memory_total", "gpu_memory_available", "gpu_memory_used", "gpu_power", "power"),
        "temperature_gpu",
    }


def test_nothing_at_all_is_unknown_and_no_error(tmp_path: Path) -> None:
    """A root without a single file has no readings; nothing is 0 that was not read."""
    standing = build("container_v2", tmp_path / "board", library=lost())
    empty = tmp_path / "empty"
    empty.mkdir()

    groups = overview(type(standing.sources)(empty, standing.sources.nvml))

    values = {name: one.value for group in groups.values() for name, one in group.items()}
    assert [name for name, value in values.items() if value is not None] == ["cores"]
