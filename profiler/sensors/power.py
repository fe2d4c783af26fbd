"""What this machine draws now, rail by rail and as a whole, and the counters of what it has drawn.

Joules over a stretch of time are made of these in `power.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from profiler.sensors.kernel_files import find, read_number, read_text, shown
from profiler.sensors.readings import Reading, unknown
from profiler.sensors.sources import HERE, Sources

# A rail that feeds the whole module; where there is one, the others are parts of it.
INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
# Rails that feed the GPU and nothing else.
GPU_RAILS = ("VDD_GPU", "GPU", "POM_5V_GPU")
# An INA3221 measures three rails; its further channels are shunt voltages and their sum.
INA3221_CHANNELS = (1, 2, 3)
NOT_CONNECTED = "NC"


class Counter(NamedTuple):
    """Joules since some moment in the past."""

    joules: float
    wraps_at_j: float | None
    """Joules at which the counter starts from 0 again; None if it never does."""


def rails(sources: Sources = HERE) -> dict[str, Reading]:
    """Read the power of each supply rail that is measured, in W."""
    found: dict[str, Reading] = {}
    for chip in find(sources.root, "sys/class/hwmon/hwmon*"):
        name = read_text(chip / "name")
        if name == "ina3221":
            found |= _ina3221(chip, sources.root)
        elif name == "ina238":  # what goes into Thor's carrier board
            microwatts = read_number(chip / "power1_input")
            if microwatts is not None:
                source = shown(chip / "power1_input", sources.root)
                found["VIN"] = Reading(microwatts / 1e6, source, "W")
    return found or _iio(sources.root) or _pmic(sources)


def _ina3221(chip: Path, root: Path) -> dict[str, Reading]:
    found = {}
    for channel in INA3221_CHANNELS:
        label = read_text(chip / f"in{channel}_label")
        millivolts = read_number(chip / f"in{channel}_input")
        milliamperes = read_number(chip / f"curr{channel}_input")
        if label in (None, NOT_CONNECTED) or millivolts is None or milliamperes is None:
            continue
        source = f"{shown(chip, root)} in{channel} x curr{channel}"
        found[str(label)] = Reading(millivolts * milliamperes / 1e6, source, "W")
    return found


def _iio(root: Path) -> dict[str, Reading]:
    """Read the same chip under JetPack 4, which has a driver of its own for it."""
    found = {}
    pattern = "iio:device*/in_power*_input"
    for file in find(
        root, f"sys/bus/i2c/drivers/ina3221x/*/{pattern}", f"sys/bus/i2c/devices/*/{pattern}"
    ):
        channel = re.sub(r"\D", "", file.name)
        label, milliwatts = read_text(file.parent / f"rail_name_{channel}"), read_number(file)
        if label not in (None, NOT_CONNECTED) and milliwatts is not None:
            found[str(label)] = Reading(milliwatts / 1000, shown(file, root), "W")
    return found


def _pmic(sources: Sources) -> dict[str, Reading]:
    """Read the rails of a Raspberry Pi 5; older ones have no such chip and no rails."""
    answer = sources.vcgencmd("pmic_read_adc") or ""
    values = dict(re.findall(r"(\w+_[AV]) (?:current|volt)\(\d+\)=([\d.]+)[AV]", answer))
    return {
        name[:-2]: Reading(
            float(amperes) * float(values[f"{name[:-2]}_V"]), "vcgencmd pmic_read_adc", "W"
        )
        for name, amperes in values.items()
        if name.endswith("_A") and f"{name[:-2]}_V" in values
    }


def power(sources: Sources = HERE, found: dict[str, Reading] | None = None) -> Reading:
    """Return what the machine draws in W; `estimated` where only a part of it is measured.

    Args:
        sources: Where to look.
        found: What `rails` has said just now, so that it is not read twice.
    """
    found = rails(sources) if found is None else found
    for name in INPUT_RAILS:
        if name in found:
            return found[name]
    if found:
        total = sum(reading.value or 0.0 for reading in found.values())
        return Reading(total, f"sum of {len(found)} rails", "W", estimated=True)
    gpu = gpu_power(sources, found)
    return gpu._replace(source=f"{gpu.source}, GPU only", estimated=True) if gpu.value else gpu


def gpu_power(sources: Sources = HERE, found: dict[str, Reading] | None = None) -> Reading:
    """Return what the GPU alone draws in W."""
    milliwatts = sources.nvml.ask("nvmlDeviceGetPowerUsage")
    if milliwatts is not None:
        return Reading(milliwatts / 1000, "NVML", "W")
    found = rails(sources) if found is None else found
    return next((found[name] for name in GPU_RAILS if name in found), unknown("W"))


def counters(sources: Sources = HERE) -> dict[str, Counter]:
    """Read the energy counters of the hardware, by what they count."""
    found = {}
    millijoules = sources.nvml.ask("nvmlDeviceGetTotalEnergyConsumption")
    if millijoules is not None:
        found["NVML"] = Counter(millijoules / 1000, None)
    # Packages only: their parts are counted in them. Since CVE-2020-8694 only root may read this.
    for folder in find(sources.root, "sys/class/powercap/intel-rapl:[0-9]"):
        microjoules = read_number(folder / "energy_uj")
        most = read_number(folder / "max_energy_range_uj")
        if microjoules is not None:
            found[folder.name] = Counter(microjoules / 1e6, most / 1e6 if most else None)
    return found


class EnergyMeter:
    """Adds up what is drawn; `update` has to be called several times a minute."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._counters: dict[str, Counter] = {}
        self._integrated = 0.0
        self._last: tuple[float, float] | None = None
        self._power = unknown("W")

    def update(self, now_s: float, power: Reading, counters: dict[str, Counter]) -> None:
        """Take note of what is drawn at *now_s*, and of where the counters stand."""
        for name, counter in counters.items():
            if name in self._counters:
                self._counted += _difference(self._counters[name], counter)
        self._counters |= counters
        if power.value is None:
            self._last = None  # a gap is not bridged
            return
        if self._last is not None:
            then_s, watts = self._last
            self._integrated += (now_s - then_s) * (watts + power.value) / 2
        self._last, self._power = (now_s, power.value), power

    def joules(self) -> Reading:
        """Return what was drawn since the first update.

        Rails of a board come before counters, which count the processor and the GPU but not the
        board around them and are `estimated` for that.
        """
        if self._power.value is not None and not (self._counters and self._power.estimated):
            source = f"{self._power.source}, over time"
            return Reading(self._integrated, source, "J", self._power.estimated)
        if self._counters:
            return Reading(self._counted, " + ".join(self._counters), "J", estimated=True)
        return unknown("J")


def _difference(before: Counter, after: Counter) -> float:
    gained = after.joules - before.joules
    if gained >= 0:
        return gained
    # A wrapped counter; without a known end it was reset, by a driver that was loaded anew.
    return gained + after.wraps_at_j if after.wraps_at_j else after.joules
