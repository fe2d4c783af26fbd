"""How much a run may take, on fake boards."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from profiler.sensors.memory_budget import budget, held, reserve_bytes
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import no_library

MIB = 2**20
GIB = 2**30


@pytest.mark.parametrize(
    ("total", "expected"), [(1 * GIB, 128 * MIB), (8 * GIB, 0.05 * 8 * GIB), (64 * GIB, GIB)]
)
def test_the_reserve_has_two_bounds(total: float, expected: float) -> None:
    """A twentieth, but no less than a board needs and no more than is of use."""
    assert reserve_bytes(total) == expected


def test_a_discrete_gpu_has_a_budget_of_its_own(tmp_path: Path) -> None:
    """On the GPU its free memory counts and what we hold of it, and not the host's."""
    standing = build("rtx_laptop", tmp_path)
    cuda = SimpleNamespace(
        memory_reserved=lambda _number: 256 * MIB,
        get_device_properties=lambda _number: SimpleNamespace(is_integrated=False),
    )
    sources = Sources(standing.root, standing.sources.nvml, cuda)

    allowed = budget(sources, on_gpu=True)

    assert allowed.value == (5120 + 256) * MIB - 0.05 * 6144 * MIB


def test_on_a_jetson_cuda_memory_is_held_beside_the_resident_set(tmp_path: Path) -> None:
    """What torch has reserved does not appear in VmRSS, and is ours all the same."""
    standing = build("orin_nano_jp6", tmp_path)
    cuda = SimpleNamespace(memory_reserved=lambda _number: 700 * MIB)
    sources = Sources(standing.root, standing.sources.nvml, cuda)

    assert held(sources, on_gpu=True).value == 800 * MIB
    assert held(sources).value == 100 * MIB


def test_a_full_machine_leaves_what_we_hold(tmp_path: Path) -> None:
    """With less available than the reserve the budget is what the process has already."""
    standing = build("nano_jp4", tmp_path)
    standing.write({"proc/meminfo": "MemTotal: 4059196 kB\nMemAvailable: 1024 kB\n"})

    assert budget(standing.sources).value == 100 * MIB


def test_a_budget_by_hand_is_taken(tmp_path: Path) -> None:
    """Somebody who knows better decides, up to all there is."""
    sources = build("nano_jp4", tmp_path).sources

    assert budget(sources, by_hand=2.0 * GIB).value == 2 * GIB
    assert budget(sources, by_hand=2.0 * GIB).source == "set by hand"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 5.0 * GIB])
def test_a_budget_that_cannot_be_is_one_clear_line(tmp_path: Path, value: float) -> None:
    """No budget at all and one above the total name the setting and what there is."""
    sources = build("nano_jp4", tmp_path).sources

    with pytest.raises(ValueError, match=r"^memory_bytes .*(above 0|3,964 MiB)") as caught:
        budget(sources, by_hand=value)
    assert "\n" not in str(caught.value)


def test_without_files_the_budget_is_unknown(tmp_path: Path) -> None:
    """Unknown memory is no budget of 0; a budget by hand still counts."""
    sources = Sources(tmp_path, Nvml(no_library()))

    assert budget(sources).value is None
    assert budget(sources, by_hand=1.0 * GIB).value == GIB
