"""Checks of the machine itself: board, heat, memory, swap, disk, limits, clock.

Nothing here starts a process or a connection; what is read is given, so that another folder can
stand for another machine. Not here: what computes (`compute.py`).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from edge_sdk.doctor.finding import Finding, failure, ok, skipped, warning
from profiler.sensors.board import board as board_name
from profiler.sensors.board import is_tegra, jetpack, power_mode
from profiler.sensors.heat import temperature, temperatures, throttling
from profiler.sensors.memory_budget import budget, gpu_memory, gpu_memory_used, others, pool, swap
from profiler.sensors.readings import NOT_KNOWN
from profiler.sensors.sources import HERE, Sources

try:
    import resource
except ImportError:  # pragma: no cover - not a POSIX system
    resource = None  # type: ignore[assignment]

MIB, GIB = 2**20, 2**30
# torch and transformers alone take 250 MiB; then there is no block of a model yet.
LEAST_BUDGET_BYTES, FEW_BUDGET_BYTES = 300 * MIB, GIB
# A checkpoint of adapters takes megabytes, the parts of a model up to gigabytes.
LEAST_DISK_BYTES, FEW_DISK_BYTES = 100 * MIB, 2 * GIB
# A device has two connections and some files open; libraries open many while they are loaded.
LEAST_FILES, FEW_FILES = 128, 512
# No earlier clock can be right: this version did not exist.
EARLIEST_YEAR = 2026
# Swap beyond this share in use means that the machine lives on it already.
MUCH_SWAP = 0.5
NUM_PROCESSES, MOST_LOOKED_AT = 3, 30

Hogs = Callable[[], Sequence[tuple[str, int]]]


def check_python(
    *, bits: int = 64 if sys.maxsize > 2**32 else 32, machine: str = platform.machine()
) -> Finding:
    """Check which Python this is, and whether there are compute libraries for it."""
    text = f"{platform.python_version()}, {machine}, {bits} bit, {sys.executable}"
    if bits == 32:
        return failure(
            "python",
            f"{text}: there are no wheels of torch or onnxruntime for 32 bit",
            "install a 64-bit system (Raspberry Pi OS 64-bit) and its Python",
        )
    return ok("python", text)


def check_board(sources: Sources = HERE) -> Finding:
    """Find out which board this is, its JetPack and its power mode."""
    name, release = board_name(sources).value, jetpack(sources).value
    mode = power_mode(sources).value
    parts = [
        str(name or "unknown board"),
        f"JetPack {release}" if release else "",
        f"power mode {mode}" if mode else "",
    ]
    text = ", ".join(part for part in parts if part)
    if is_tegra(sources) and not release:
        return warning(
            "board",
            f"{text}: a Jetson whose release of L4T cannot be read, as in a container",
            "docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ...",
        )
    return ok("board", text)


def check_heat(sources: Sources = HERE) -> Finding:
    """Check whether the machine slows itself down, and how hot it is."""
    slow, hottest = throttling(sources), temperature(temperatures(sources))
    degrees = "" if hottest.value is None else f"{hottest.value:.0f} C"
    if slow.now:
        is_supply = any("voltage" in reason for reason in slow.now)
        cure = "use the board's own power supply and cable" if is_supply else "cool it: fan, air"
        reasons = ", ".join(slow.now)
        return warning("heat", f"{degrees or 'too hot'}, it runs slower now: {reasons}", cure)
    if "under-voltage" in slow.since_boot:
        text = f"{degrees}; since it was started: {', '.join(slow.since_boot)}"
        return warning("heat", text.lstrip("; "), "use the board's own power supply and cable")
    if slow.source == NOT_KNOWN and not degrees:
        return skipped("heat", "no sensor here that can be read")
    return ok("heat", ", ".join(part for part in (degrees, "not throttled") if part))


def biggest_processes() -> list[tuple[str, int]]:
    """Return name and bytes of the processes that hold most, without this one.

    What processes share, such as libraries and the pages of those that were forked, counts once.
    """
    seen = [
        process
        for process in psutil.process_iter(["name", "memory_info", "pid"])
        if process.info["memory_info"] is not None and process.info["pid"] != os.getpid()
    ]
    seen.sort(key=lambda process: -process.info["memory_info"].rss)
    found: dict[str, int] = {}
    for process in seen[:MOST_LOOKED_AT]:
        name = str(process.info["name"])
        found[name] = found.get(name, 0) + own_bytes(process)
    return sorted(found.items(), key=lambda item: -item[1])[:NUM_PROCESSES]


def own_bytes(process: psutil.Process) -> int:
    """Return what a process holds, its part of what it shares included where that can be read.

    One that has ended by now holds nothing.
    """
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0
    except (psutil.Error, OSError, AttributeError):  # another user's, or not Linux
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))
        return 0


def check_memory(
    sources: Sources = HERE,
    *,
    on_gpu: bool = False,
    by_hand: float | None = None,
    hogs: Hogs = biggest_processes,
) -> Finding:
    """Check what a run may take, and who has the rest."""
    try:
        left = budget(sources, on_gpu=on_gpu, by_hand=by_hand)
    except ValueError as error:
        return failure("memory", f"profile.{error}", "profile.memory_bytes=null")
    if left.value is None:
        return skipped("memory", "nothing here tells how much there is")
    total, available = pool(sources, on_gpu=on_gpu)
    kind = "of the GPU " if on_gpu and gpu_memory(sources).total.value is not None else ""
    held = "" if total.value is None else f" of {_mib(total.value)}"
    text = f"{_mib(left.value)}{held} {kind}for a run"
    if by_hand is not None and available.value is not None and by_hand > available.value:
        return warning(
            "memory", f"{text}, set by hand, but only {_mib(available.value)} are free", _free()
        )
    text += _held_by_others(sources, hogs)
    if left.value < LEAST_BUDGET_BYTES:
        return failure("memory", f"{text}: too little for any model", _free())
    if left.value < FEW_BUDGET_BYTES:
        return warning("memory", f"{text}: room for a very small slice only", _free())
    return ok("memory", text)


def _held_by_others(sources: Sources, hogs: Hogs) -> str:
    rest, on_gpu = others(sources).value, gpu_memory_used(sources)
    text = "" if rest is None else f"; others hold {_mib(rest)}"
    if on_gpu.value:
        text += f", {_mib(on_gpu.value)} through the GPU"
    names, left = [], (rest or 0.0) + (on_gpu.value or 0.0)
    for name, size in hogs():
        if 100 * MIB <= size <= left:  # what holds more counts against another limit than ours
            names.append(f"{name} {_mib(size)}")
            left -= size
    return f"{text} ({', '.join(names)})" if text and names else text


def _free() -> str:
    return "stop what else runs; a desktop: sudo systemctl isolate multi-user.target"


def check_swap(sources: Sources = HERE) -> Finding:
    """Check swap and zram, and whether the machine lives on them already."""
    sizes = {name: reading.value for name, reading in swap(sources).items()}
    size, zram = sizes["swap"], sizes["zram"]
    if size is None or zram is None:
        return skipped("swap", "no /proc/swaps here")
    if not size + zram:
        return ok("swap", "none: what needs more memory than there is, is killed at once")
    used = (sizes["swap_used"] or 0.0) + (sizes["zram_used"] or 0.0)
    kinds = [f"{_mib(n)} {kind}" for kind, n in (("on disk", size), ("of zram", zram)) if n]
    text = f"{' and '.join(kinds)}, {_mib(used)} in use"
    if used > MUCH_SWAP * (size + zram):
        return warning("swap", f"{text}: memory is short, a run would crawl", _free())
    return ok("swap", text)


def check_disk(name: str, folder: Path, free_bytes: Callable[[Path], int] | None = None) -> Finding:
    """Check whether *folder*, made where it is missing, could be written and has room.

    Args:
        name: Key of the config that says where the folder is: `cache` or `state`.
        folder: What will be written to; it need not exist, and is not made.
        free_bytes: Free space by folder, for tests.
    """
    check = f"disk ({name})"
    folder = folder.absolute()
    # os.path.exists, because a folder that we may not look into is an error to Path.exists.
    place = next((one for one in (folder, *folder.parents) if os.path.exists(one)), folder)
    cure = f"sudo chown -R $USER {place}, or name another folder: {name}=..."
    if not place.is_dir():
        return failure(check, f"{place} is a file, so {folder} cannot be made", f"{name}=...")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
        left = (free_bytes or _free_bytes)(place)
    except OSError as error:
        return failure(check, f"{place} cannot be written: {error.strerror}", cure)
    text = f"{_mib(left)} free for {folder}"
    clean = f"free some, or use another disk: {name}=..."
    if left < LEAST_DISK_BYTES:
        return failure(check, text, clean)
    if left < FEW_DISK_BYTES:
        return warning(check, f"{text}: parts of a larger model will not fit", clean)
    return ok(check, text)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def read_limits() -> dict[str, int | None]:
    """Return this process's limits by name, None for no limit."""
    if resource is None:  # pragma: no cover
        return {}
    names = {"files": "NOFILE", "locked": "MEMLOCK", "address space": "AS"}
    limits = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{n}"))[0] for name, n in names.items()
    }
    return {n: None if limit == resource.RLIM_INFINITY else limit for n, limit in limits.items()}


def check_limits(limits: dict[str, int | None] | None = None) -> Finding:
    """Check what the shell or the service allows this process: open files, memory."""
    found = read_limits() if limits is None else limits
    files, locked, space = (found.get(name) for name in ("files", "locked", "address space"))
    text = f"{files or 'any number of'} open files, {_limit(locked)} of locked memory"
    if space is not None:
        return warning(
            "limits",
            f"{text}, {_limit(space)} of address space: libraries reserve far more than they use",
            "ulimit -v unlimited",
        )
    cure = "ulimit -n 4096, in a systemd unit LimitNOFILE=4096"
    if files is not None and files < LEAST_FILES:
        return failure("limits", text, cure)
    if files is not None and files < FEW_FILES:
        return warning("limits", text, cure)
    return ok("limits", text)


def _limit(limit: int | None) -> str:
    return "any amount" if limit is None else _mib(limit)


def check_clock(now_s: float | None = None) -> Finding:
    """Check whether the clock can be right; boards without a battery wake up in 1970."""
    now = time.gmtime(time.time() if now_s is None else now_s)
    text = time.strftime("%Y-%m-%d %H:%M UTC", now)
    if now.tm_year < EARLIEST_YEAR:
        return warning(
            "clock",
            f"{text} cannot be right; a run does not mind, but downloads over https fail",
            "sudo timedatectl set-ntp true",
        )
    return ok("clock", f"{text}; the coordinator's is not known here")


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"
