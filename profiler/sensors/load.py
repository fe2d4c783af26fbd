"""How busy CPU and GPU are, and how fast they run now against how fast they may.

The highest clock of all cores stands for the CPU: idle cores sleep and say nothing of its speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from profiler.sensors.kernel_files import find, read_number, read_text, shown
from profiler.sensors.readings import Reading, unknown
from profiler.sensors.sources import HERE, Sources

# The GPU of a Tegra among the devices that change their clock: Orin and Nano, JetPack 5, Thor.
DEVFREQ = (
    "sys/class/devfreq/*.gpu",
    "sys/class/devfreq/*.ga10b",
    "sys/class/devfreq/*.gv11b",
    "sys/class/devfreq/*.gp10b",
    "sys/class/devfreq/gpu-gpc-0",
)
GPU_LOAD = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/gpu.0/load",
    "sys/devices/platform/bus@0/*.gpu/load",
    "sys/devices/platform/*.ga10b/load",
    "sys/devices/*.gv11b/load",
)


class CpuTimes(NamedTuple):
    """Ticks of all cores since boot."""

    busy: int
    total: int


def cpu_times(sources: Sources = HERE) -> CpuTimes | None:
    """Read the ticks until now; the difference of two of them is a load."""
    words = (read_text(sources.root / "proc/stat") or "").split("\n")[0].split()
    if len(words) < 6 or words[0] != "cpu":
        return None
    # user nice system idle iowait irq softirq steal; guest time is part of user time already.
    ticks = [int(word) for word in words[1:9]]
    return CpuTimes(sum(ticks) - ticks[3] - ticks[4], sum(ticks))


def cpu_load(before: CpuTimes | None, after: CpuTimes | None) -> Reading:
    """Return the busy share of all cores between two moments, in %."""
    if before is None or after is None or after.total <= before.total:
        return unknown("%")
    busy = (after.busy - before.busy) / (after.total - before.total)
    return Reading(100 * busy, "/proc/stat", "%")


def cpu_clock(sources: Sources = HERE) -> Reading:
    """Read the clock of the fastest core now."""
    reading = _fastest(sources, "scaling_cur_freq")
    if reading.value is not None:
        return reading
    lines = (read_text(sources.root / "proc/cpuinfo") or "").split("\n")
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return Reading(max(clocks) * 1e6, "/proc/cpuinfo cpu MHz", "Hz") if clocks else unknown("Hz")


def cpu_clock_max(sources: Sources = HERE) -> Reading:
    """Read the highest clock that power mode and governor permit now."""
    return _fastest(sources, "scaling_max_freq")


def _fastest(sources: Sources, name: str) -> Reading:
    files = find(sources.root, f"sys/devices/system/cpu/cpu[0-9]*/cpufreq/{name}")
    return _highest([(file, read_number(file)) for file in files], sources.root)


def _highest(found: Iterable[tuple[Path, int | None]], root: Path) -> Reading:
    known = [(number, file) for file, number in found if number is not None]
    if not known:
        return unknown("Hz")
    khz, file = max(known, key=lambda one: one[0])
    return Reading(khz * 1000, shown(file, root), "Hz")


def gpu_load(sources: Sources = HERE) -> Reading:
    """Read the busy share of the GPU in %."""
    rates = sources.nvml.ask("nvmlDeviceGetUtilizationRates")
    if rates is not None:
        return Reading(float(rates.gpu), "NVML", "%")
    nodes = [f"{folder.relative_to(sources.root)}/device/load" for folder in _devfreq(sources)]
    for file in find(sources.root, *GPU_LOAD, *nodes)[:1]:
        load = read_number(file)  # in tenths of a percent
        if load is not None:
            return Reading(load / 10, shown(file, sources.root), "%")
    return unknown("%")


def gpu_clock(sources: Sources = HERE) -> Reading:
    """Read the clock of the GPU now."""
    return _gpu_clock(sources, "nvmlDeviceGetClockInfo", "cur_freq")


def gpu_clock_max(sources: Sources = HERE) -> Reading:
    """Read the highest clock of the GPU that the power mode permits now."""
    return _gpu_clock(sources, "nvmlDeviceGetMaxClockInfo", "max_freq")


def _gpu_clock(sources: Sources, question: str, name: str) -> Reading:
    graphics: Any = sources.nvml.constant("NVML_CLOCK_GRAPHICS")
    mhz = sources.nvml.ask(question, graphics)
    if mhz is not None:
        return Reading(mhz * 1e6, "NVML", "Hz")
    for folder in _devfreq(sources):
        hz = read_number(folder / name)
        if hz is not None:
            return Reading(hz, shown(folder / name, sources.root), "Hz")
    return unknown("Hz")


def _devfreq(sources: Sources) -> list[Path]:
    return find(sources.root, *DEVFREQ)
