"""How hot this machine is, and whether it slows itself down because of that or of its supply."""

from __future__ import annotations

import re
from typing import NamedTuple

from profiler.sensors.kernel_files import find, read_number, read_text, shown
from profiler.sensors.readings import NOT_KNOWN, Reading, unknown
from profiler.sensors.sources import HERE, Sources

# PMIC-Die of JetPack 4 says 100 degrees whatever happens; the other is a weighted mean for the fan.
NO_TEMPERATURES = ("PMIC-Die", "thermal-fan-est")
# The one that decides: the hottest point of a Jetson's die, as its firmware sees it.
DECISIVE = ("tj", "gpu", "cpu", "x86_pkg_temp")
# Cooling devices of Tegra that do nothing but slow down; fans and caps by the user are others.
SLOWING = re.compile(r"throttle-alert|hot-surface|-balanced$")
# NVML, reasons for a clock below what was asked for; idle and limits by the user are no throttling.
NVML_REASONS = {
    0x4: "GPU power limit",
    0x8: "GPU hardware slowdown",
    0x20: "GPU temperature (software)",
    0x40: "GPU temperature (hardware)",
    0x80: "GPU power brake",
}
# Bits of `vcgencmd get_throttled`; 16 bits higher they tell what has happened since boot.
FIRMWARE_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
# Counters of Orin and Thor that mean trouble. The third, for current peaks, goes up by tens of
# thousands at full power and means nothing.
OVER_CURRENT = {"oc1": "under_voltage", "oc2": "over_current", "oc3": "current_peaks"}
HARMLESS = frozenset({OVER_CURRENT["oc3"]})


class Throttling(NamedTuple):
    """Evidence that the machine runs slower than it could."""

    now: tuple[str, ...]
    """What slows it down at this moment."""
    since_boot: tuple[str, ...]
    """What has slowed it down at some time since it was started."""
    counts: dict[str, int]
    """Events since boot; only their differences mean something."""
    source: str
    """`unknown` where nothing here can tell; then the rest is empty."""


def temperatures(sources: Sources = HERE) -> dict[str, Reading]:
    """Read the temperature in C of each sensor that answers, by a short name."""
    found: dict[str, Reading] = {}
    degrees = _nvml_temperature(sources)
    if degrees is not None:
        found["gpu"] = Reading(degrees, "NVML", "C")
    for zone in find(sources.root, "sys/class/thermal/thermal_zone*"):
        name, millidegrees = read_text(zone / "type"), read_number(zone / "temp")
        if name is None or name in NO_TEMPERATURES or millidegrees is None:
            continue
        short = re.sub(r"[-_]therm(al)?$", "", name.lower())
        found.setdefault(short, Reading(millidegrees / 1000, shown(zone, sources.root), "C"))
    return found


def _nvml_temperature(sources: Sources) -> float | None:
    sensor = sources.nvml.constant("NVML_TEMPERATURE_GPU")
    for question in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # since NVML 13
        degrees = sources.nvml.ask(question, sensor)
        if degrees is not None:
            return float(degrees)
    return None


def temperature(found: dict[str, Reading]) -> Reading:
    """Return the temperature that decides over throttling, of *found* by `temperatures`."""
    for name in DECISIVE:
        if name in found:
            return found[name]
    return max(found.values(), key=lambda reading: reading.value or 0.0, default=unknown("C"))


def throttling(sources: Sources = HERE) -> Throttling:
    """Return what slows this machine down, from every source that can tell."""
    found = [
        one
        for one in (_nvml(sources), _alerts(sources), _firmware(sources), _counters(sources))
        if one is not None
    ]
    return Throttling(
        now=tuple(reason for one in found for reason in one.now),
        since_boot=tuple(reason for one in found for reason in one.since_boot),
        counts={name: count for one in found for name, count in one.counts.items()},
        source=", ".join(one.source for one in found) or NOT_KNOWN,
    )


def _nvml(sources: Sources) -> Throttling | None:
    for question in (
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ):
        bits = sources.nvml.ask(question)
        if bits is not None:
            reasons = tuple(text for bit, text in NVML_REASONS.items() if bits & bit)
            return Throttling(reasons, (), {}, "NVML")
    return None


def _alerts(sources: Sources) -> Throttling | None:
    found = {}
    for device in find(sources.root, "sys/class/thermal/cooling_device*"):
        name, state = read_text(device / "type"), read_number(device / "cur_state")
        if name is not None and state is not None and SLOWING.search(name):
            found[name] = state
    reasons = tuple(name for name, state in found.items() if state > 0)
    return Throttling(reasons, (), {}, "cooling devices") if found else None


def _firmware(sources: Sources) -> Throttling | None:
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", sources.vcgencmd("get_throttled") or "")
    if match:
        bits = int(match[1], 16)
        return Throttling(
            tuple(text for bit, text in FIRMWARE_BITS.items() if bits >> bit & 1),
            tuple(text for bit, text in FIRMWARE_BITS.items() if bits >> bit + 16 & 1),
            {},
            "vcgencmd get_throttled",
        )
    for chip in find(sources.root, "sys/class/hwmon/hwmon*"):
        if read_text(chip / "name") == "rpi_volt":
            is_low = bool(read_number(chip / "in0_lcrit_alarm"))
            return Throttling((FIRMWARE_BITS[0],) if is_low else (), (), {}, "hwmon rpi_volt")
    return None


def _counters(sources: Sources) -> Throttling | None:
    """Read the counters of Tegra's over-current unit, or of an x86 processor's throttling."""
    counts: dict[str, int] = {}
    for file in find(sources.root, "sys/class/hwmon/hwmon*/oc*_event_cnt"):
        count = read_number(file)
        if count is not None:
            name = file.name.split("_")[0]
            counts[OVER_CURRENT.get(name, name)] = count
    if counts:
        return Throttling((), (), counts, "hwmon soctherm_oc")
    for kind in ("core", "package"):
        pattern = f"sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/{kind}_throttle_count"
        numbers = [read_number(file) for file in find(sources.root, pattern)]
        known = [number for number in numbers if number is not None]
        if known:  # every core repeats the count of its package
            counts[f"cpu_{kind}"] = sum(known) if kind == "core" else max(known)
    return Throttling((), (), counts, "thermal_throttle") if counts else None
