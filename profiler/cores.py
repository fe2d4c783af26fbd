"""Processor cores that this process may use: its affinity, and the quota of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

from profiler.cgroup import groups
from profiler.readings import Reading, smallest
from profiler.sysfs import read_number, read_words


def allowed_cores(root: Path = Path("/")) -> Reading:
    """Cores that this process may keep busy; a quota can be a fraction of one."""
    readings = [_affinity()]
    for folder in groups("cpu", root):
        quota = _quota(folder)
        if quota is not None:
            readings.append(Reading(quota, f"quota in /{folder.relative_to(root)}", "cores"))
    return smallest(readings, "cores")


def _affinity() -> Reading:
    if hasattr(os, "sched_getaffinity"):
        return Reading(len(os.sched_getaffinity(0)), "sched_getaffinity", "cores")
    return Reading(os.cpu_count(), "os.cpu_count", "cores")


def _quota(folder: Path) -> float | None:
    """Return the quota of one group in cores, None without one."""
    words = read_words(folder / "cpu.max")
    if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    quota = read_number(folder / "cpu.cfs_quota_us")
    period = read_number(folder / "cpu.cfs_period_us")
    if quota is not None and quota > 0 and period:  # -1 stands for no quota
        return quota / period
    return None
