"""What a board is made of, and the pieces that many boards have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = dict[str, str | None]
MIB = 2**20
KIB = 1024
STATUS = "Name:\tpython3\nVmHWM:\t  204800 kB\nVmRSS:\t  102400 kB\n"
# What `meminfo` says of this process everywhere.
PROCESS = {"process_rss": 100 * MIB, "process_peak_rss": 200 * MIB}
NO_SWAP = {"swap": 0, "swap_used": 0, "zram": 0, "zram_used": 0}


@dataclass(frozen=True)
class Board:
    """One machine: its files, its NVML, and what must be read from them."""

    files: Files
    """Path to content; None stands for a file that is there and cannot be read. What begins with
    `#!` is a program."""
    nvml: Any
    """A module in the place of pynvml."""
    values: dict[str, Any]
    """Every value that is known there, by name; all others are unknown."""
    sources: dict[str, str]
    """Where some of them come from."""


def write(root: Path, files: Files) -> None:
    """Write *files* under *root*; what is there already is replaced."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.mkdir()  # as with EAGAIN or EACCES, reading it is an OSError, for root as well
            continue
        path.write_text(text)
        if text.startswith("#!"):
            path.chmod(0o755)


def meminfo(total_kb: int, available_kb: int, more: str = "") -> Files:
    """Memory of the machine, and of this process, which holds 100 MiB and held 200."""
    text = f"MemTotal: {total_kb} kB\nMemFree: 2048 kB\nMemAvailable: {available_kb} kB\n{more}"
    return {"proc/meminfo": text, "proc/self/status": STATUS}


def swaps(*areas: tuple[str, int, int]) -> Files:
    """Swap areas: name, size and use in KiB."""
    rows = [f"{name} partition {size} {used} 5" for name, size, used in areas]
    return {"proc/swaps": "\n".join(["Filename Type Size Used Priority", *rows]) + "\n"}


def cpu(cores: int, mhz: int, most_mhz: int) -> Files:
    """Cores, the last of which runs at *mhz* and the others at a third of it."""
    files: Files = {"proc/stat": "cpu  1000 0 1000 7000 500 0 500 0 0 0\ncpu0 1 1 1 1 1 1 1 1\n"}
    for core in range(cores):
        folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        now = mhz if core == cores - 1 else mhz // 3
        files[f"{folder}/scaling_cur_freq"] = f"{now * 1000}\n"
        files[f"{folder}/scaling_max_freq"] = f"{most_mhz * 1000}\n"
    return files


def zones(**millidegrees: int | None) -> Files:
    """Thermal zones in order; `__` stands for a hyphen, None for a sensor without power."""
    files: Files = {}
    for number, (name, value) in enumerate(millidegrees.items()):
        folder = f"sys/class/thermal/thermal_zone{number}"
        files[f"{folder}/type"] = name.replace("__", "-") + "\n"
        files[f"{folder}/temp"] = None if value is None else f"{value}\n"
    return files


def cooling(**states: int) -> Files:
    """Cooling devices in order, with their state."""
    files: Files = {}
    for number, (name, state) in enumerate(states.items()):
        folder = f"sys/class/thermal/cooling_device{number}"
        files[f"{folder}/type"] = name.replace("__", "-") + "\n"
        files[f"{folder}/cur_state"] = f"{state}\n"
    return files


def ina3221(hwmon: int, rails: Sequence[tuple[str, int, int]]) -> Files:
    """A power monitor with three rails (label, mV, mA) and the channels that are no rails."""
    folder = f"sys/class/hwmon/hwmon{hwmon}"
    files: Files = {f"{folder}/name": "ina3221\n"}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        files[f"{folder}/in{channel}_label"] = f"{label}\n"
        files[f"{folder}/in{channel}_input"] = f"{millivolts}\n"
        files[f"{folder}/curr{channel}_input"] = f"{milliamperes}\n"
        files[f"{folder}/in{channel + 3}_input"] = "40\n"
    files[f"{folder}/in7_label"] = "sum of shunt voltages\n"
    files[f"{folder}/in7_input"] = "120\n"
    files[f"{folder}/curr4_input"] = "99999\n"
    return files


def over_current(hwmon: int, counts: Sequence[int]) -> Files:
    """Event counters of Orin and Thor."""
    folder = f"sys/class/hwmon/hwmon{hwmon}"
    counters: Files = {f"{folder}/oc{n}_event_cnt": f"{c}\n" for n, c in enumerate(counts, 1)}
    return {f"{folder}/name": "soctherm_oc\n", **counters}


def devfreq(name: str, mhz: int, most_mhz: int) -> Files:
    """The GPU's clock."""
    folder = f"sys/class/devfreq/{name}"
    return {
        f"{folder}/cur_freq": f"{mhz * 1_000_000}\n",
        f"{folder}/max_freq": f"{most_mhz * 1_000_000}\n",
    }


def jetson(model: str, compatible: str, release: str, modes: Sequence[str], mode: int) -> Files:
    """Device tree, release of L4T, and power modes, of which *mode* is on."""
    major, _, revision = release.partition(".")
    conf = "".join(
        f"# mode {n}\n< POWER_MODEL ID={n} NAME={name} >\nCPU_ONLINE CORE_0 1\n"
        for n, name in enumerate(modes)
    )
    return {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "".join(f"{name}\0" for name in compatible.split()),
        "etc/nv_tegra_release": f"# R{major} (release), REVISION: {revision}, GCID: 1, BOARD: x\n",
        "etc/nvpmodel.conf": conf + "< PM_CONFIG DEFAULT=0 >\n",
        "var/lib/nvpmodel/status": f"pmode:{mode:04d} fmode:quiet\n",
    }
