"""Memory of this process and of this machine, and who was killed for want of it.

From /proc and the control groups. CUDA memory of a Jetson does not appear in a process's resident
set; nothing here counts it.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from profiler.sensors.cgroup import groups
from profiler.sensors.kernel_files import read_number, read_text, read_words
from profiler.sensors.readings import MemoryInfo, Reading, smallest, unknown

ROOT = Path("/")

# Version 1 says "no limit" with the largest multiple of the page size that fits a signed 64 bit
# number; with 64 KiB pages it is a little lower. No machine has this much memory.
_NO_LIMIT_BYTES = 1 << 62


def rss(root: Path = ROOT) -> Reading:
    """Read the resident memory of this process now."""
    value = field_bytes(root / "proc/self/status", "VmRSS")
    if value is not None:
        return Reading(value, "/proc/self/status VmRSS", "B")
    if root == ROOT:
        return Reading(psutil.Process().memory_info().rss, "psutil", "B")
    return unknown("B")


def peak_rss(root: Path = ROOT) -> Reading:
    """Read the most resident memory of this process since its start or `reset_peak_rss`."""
    value = field_bytes(root / "proc/self/status", "VmHWM")
    if value is not None:
        return Reading(value, "/proc/self/status VmHWM", "B")
    if root == ROOT:
        # Second choice: it cannot be reset, and after a fork it starts at the parent's peak.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Reading(peak if sys.platform == "darwin" else peak * 1024, "getrusage", "B")
    return unknown("B")


def reset_peak_rss(root: Path = ROOT) -> bool:
    """Let the peak start anew from the present; False where the kernel does not permit it."""
    try:
        handle = os.open(root / "proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(handle, b"5")
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


def return_freed() -> None:
    """Return to the system what this process has freed and its allocator keeps for later."""
    gc.collect()  # what refers to itself is not free before
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def keep_freed() -> None:
    """Let this process keep what it frees: for one that needs as much again, step for step.

    glibc gives the end of its heap back when that is free, and how much is there depends on what
    happens to lie behind it: up to all that a step needs, whose pages the kernel then has to clear
    anew. `return_freed` gives back what is free then. Whoever sets MALLOC_... decides for himself.
    """
    is_ours = not any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and is_ours and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in _KEEPING:
            libc.mallopt(parameter, value)


# Of mallopt(3): the heap is not trimmed (M_TRIM_THRESHOLD); blocks up to 32 MiB, the most that
# glibc takes, lie in it (M_MMAP_THRESHOLD); and the heaps of threads, 64 MiB each, stay when they
# are empty (M_TOP_PAD).
_KEEPING = ((-1, -1), (-3, 32 << 20), (-2, 64 << 20))


def drop_mapped(address: int, num_bytes: int, root: Path = ROOT) -> bool:
    """Let go of pages of a mapped file that were only read; whoever reads them again has them.

    Args:
        address: Where the stretch begins.
        num_bytes: Its length; only whole pages inside it go.
        root: Where /proc lies.

    Returns:
        Whether they went: not where the stretch is memory without a file.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or first >= stop or not _is_of_file(first, stop, root):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return bool(
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED) == 0
    )


def _is_of_file(first: int, stop: int, root: Path) -> bool:
    """Return whether addresses first .. stop-1 of this process lie in one mapping of a file."""
    for line in (read_text(root / "proc/self/maps") or "").split("\n"):
        begin, _, rest = line.partition("-")
        end = rest.partition(" ")[0]
        if line and int(begin, 16) <= first and stop <= int(end, 16):
            return line.split()[4] != "0"
    return False


def memory_info(root: Path = ROOT) -> MemoryInfo:
    """Read the memory that this process could have: the machine's, or a lower group limit."""
    meminfo = root / "proc/meminfo"
    total = _host(meminfo, "MemTotal", "total", root)
    available = _host(meminfo, "MemAvailable", "available", root)
    totals, lefts = [total], [available]
    for folder in groups("memory", root):
        limit, usage = _limit(folder, root), _usage(folder)
        totals.append(limit)
        if limit.value is not None and usage is not None:
            left = max(0.0, limit.value - usage)
            lefts.append(Reading(left, f"{limit.source} less usage", "B"))
    return MemoryInfo(smallest(totals, "B"), smallest(lefts, "B"))


def _host(meminfo: Path, field: str, psutil_field: str, root: Path) -> Reading:
    value = field_bytes(meminfo, field)
    if value is not None:
        return Reading(value, f"/proc/meminfo {field}", "B")
    if root == ROOT:
        return Reading(getattr(psutil.virtual_memory(), psutil_field), "psutil", "B")
    return unknown("B")


def _limit(folder: Path, root: Path) -> Reading:
    """Return the lowest limit of one group; `memory.high` slows a process down to a standstill."""
    found = []
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        value = read_number(folder / name)
        if value is not None and value < _NO_LIMIT_BYTES:
            found.append(Reading(value, f"/{(folder / name).relative_to(root)}", "B"))
    return smallest(found, "B")


def _usage(folder: Path) -> int | None:
    """Return what a group holds, less the file cache that the kernel drops when in need."""
    for name, cache in (
        ("memory.current", "inactive_file"),
        ("memory.usage_in_bytes", "total_inactive_file"),
    ):
        usage = read_number(folder / name)
        if usage is not None:
            words = read_words(folder / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            return max(0, usage - int(stat.get(cache, "0")))
    return None


class OomKills(NamedTuple):
    """How many processes the kernel has killed because memory was short; None where unknown."""

    boot: str
    """Which start of the machine this is; empty where unknown. Counts begin anew with it."""
    group: str
    """The control group of `in_group`; one that is made anew under the same path is another."""
    in_group: int | None
    """Of the processes in this one's group."""
    on_machine: int | None

    def rose_since(self, before: OomKills) -> bool:
        """Return whether somebody was killed between *before* and this, by the closer count."""
        if not self.boot or self.boot != before.boot:
            return False
        is_same = self.group == before.group
        if is_same and self.in_group is not None and before.in_group is not None:
            return self.in_group > before.in_group
        if self.on_machine is None or before.on_machine is None:
            return False
        return self.on_machine > before.on_machine


def oom_kills(root: Path = ROOT) -> OomKills:
    """Read how many processes the kernel has killed because memory was short."""
    boot = (read_text(root / "proc/sys/kernel/random/boot_id") or "").strip()
    on_machine = _count(root / "proc/vmstat")
    for folder in groups("memory", root):
        # What happened in groups below this one is not counted where that can be told apart.
        for name in ("memory.events.local", "memory.events", "memory.oom_control"):
            if (count := _count(folder / name)) is not None:
                group = f"/{folder.relative_to(root)} {folder.stat().st_ino}"
                return OomKills(boot, group, count, on_machine)
    return OomKills(boot, "", None, on_machine)


def _count(file: Path) -> int | None:
    """Return the number after `oom_kill` in *file*; None without it."""
    words = read_words(file)
    found = dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", "")
    return int(found) if found.isdigit() else None


def field_bytes(file: Path, field: str) -> int | None:
    """Return the bytes of a line such as `VmRSS:   1234 kB` in *file*; None without it."""
    for line in (read_text(file) or "").split("\n"):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
