"""Joules over time, against sums by hand."""

from __future__ import annotations

import pytest

from profiler.sensors.power import Counter, EnergyMeter
from profiler.sensors.readings import Reading, unknown


def watts(value: float, *, estimated: bool = False) -> Reading:
    """A reading of power."""
    return Reading(value, "rail", "W", estimated)


def test_power_over_time_is_a_trapezoid() -> None:
    """Unequal steps: each counts with the mean of its two ends."""
    meter = EnergyMeter()
    for now_s, value in ((10.0, 4.0), (11.0, 6.0), (13.5, 2.0)):
        meter.update(now_s, watts(value), {})

    assert meter.joules() == Reading(5.0 * 1.0 + 4.0 * 2.5, "rail, over time", "J")


def test_a_gap_is_not_bridged() -> None:
    """While the power is unknown nothing is added, before and after it is."""
    meter = EnergyMeter()
    readings = [watts(4.0), watts(4.0), unknown("W"), watts(8.0), watts(8.0)]
    for now_s, reading in enumerate(readings):
        meter.update(float(now_s), reading, {})

    assert meter.joules().value == 4.0 + 8.0


def test_counters_are_differences_and_wrap() -> None:
    """What was counted before does not count; a counter that wraps goes on."""
    meter = EnergyMeter()
    for gpu_j, cpu_j in ((500.0, 90.0), (520.0, 99.0), (530.0, 4.0)):
        counters = {"NVML": Counter(gpu_j, None), "rapl": Counter(cpu_j, 100.0)}
        meter.update(0.0, unknown("W"), counters)

    assert meter.joules() == Reading(30.0 + 9.0 + 5.0, "NVML + rapl", "J", estimated=True)


def test_a_counter_that_was_reset_starts_anew() -> None:
    """Without a known end, less than before means that a driver was loaded anew."""
    meter = EnergyMeter()
    for joules in (500.0, 510.0, 3.0):
        meter.update(0.0, unknown("W"), {"NVML": Counter(joules, None)})

    assert meter.joules().value == 13.0


@pytest.mark.parametrize(("estimated", "expected"), [(False, 10.0), (True, 7.0)])
def test_the_whole_board_comes_before_counters_before_a_part(
    estimated: bool, expected: float
) -> None:
    """Counters see CPU and GPU; better than a guess at the board, worse than its own rail."""
    meter = EnergyMeter()
    for now_s, joules in ((0.0, 0.0), (1.0, 7.0)):
        meter.update(now_s, watts(10.0, estimated=estimated), {"NVML": Counter(joules, None)})

    assert meter.joules().value == expected


def test_no_source_is_unknown() -> None:
    """A machine that measures nothing has used an unknown amount, not none."""
    meter = EnergyMeter()
    meter.update(0.0, unknown("W"), {})
    meter.update(1.0, unknown("W"), {})

    assert meter.joules() == unknown("J")
