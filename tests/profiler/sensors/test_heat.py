"""Evidence of throttling, where `test_boards.py` has no board for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.sensors.heat import temperature, throttling
from profiler.sensors.readings import Reading, unknown
from profiler.sensors.sources import Nvml, Sources
from tests.boards.nvml import no_library, stub
from tests.boards.tree import write


@pytest.mark.parametrize(
    ("bits", "now", "since_boot"),
    [
        ("0x0", (), ()),
        ("0x50005", ("under-voltage", "throttled"), ("under-voltage", "throttled")),
        ("0xa0000", (), ("clock capped", "soft temperature limit")),
    ],
)
def test_bits_of_the_firmware(
    tmp_path: Path, bits: str, now: tuple[str, ...], since_boot: tuple[str, ...]
) -> None:
    """Low bits say what is, high bits what has been."""
    write(tmp_path, {"usr/bin/vcgencmd": f"#!/bin/sh\necho throttled={bits}\n"})

    found = throttling(Sources(tmp_path, Nvml(no_library())))

    assert (found.now, found.since_boot) == (now, since_boot)


@pytest.mark.parametrize(("alarm", "now"), [("1", ("under-voltage",)), ("0", ())])
def test_without_the_firmware_the_kernel_tells(
    tmp_path: Path, alarm: str, now: tuple[str, ...]
) -> None:
    """A container on a Pi has no vcgencmd, but the kernel's alarm."""
    chip = "sys/class/hwmon/hwmon1"
    write(tmp_path, {f"{chip}/name": "rpi_volt\n", f"{chip}/in0_lcrit_alarm": f"{alarm}\n"})

    found = throttling(Sources(tmp_path, Nvml(no_library())))

    assert (found.now, found.source) == (now, "hwmon rpi_volt")


@pytest.mark.parametrize(
    ("bits", "now"),
    [
        (0x1, ()),  # idle
        (0x2, ()),  # clocks set by the user
        (0x8 | 0x80, ("GPU hardware slowdown", "GPU power brake")),
        (0x40, ("GPU temperature (hardware)",)),
    ],
)
def test_reasons_of_nvml(tmp_path: Path, bits: int, now: tuple[str, ...]) -> None:
    """Idleness and the user's own limits are no throttling."""
    nvml = Nvml(stub("GPU", nvmlDeviceGetCurrentClocksEventReasons=bits))

    assert throttling(Sources(tmp_path, nvml)).now == now


def test_the_decisive_temperature() -> None:
    """The junction before GPU and CPU; without any of them the hottest."""
    found = {name: Reading(value, name, "C") for name, value in (("cpu", 70.0), ("tj", 60.0))}
    others = {name: Reading(value, name, "C") for name, value in (("a", 30.0), ("b", 40.0))}

    assert temperature(found).source == "tj"
    assert temperature(others).source == "b"
    assert temperature({}) == unknown("C")
