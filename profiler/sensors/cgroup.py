"""Control groups: the limits of a container or a systemd unit, versions 1 and 2.

psutil and /proc/meminfo speak of the host, whatever limit stands around this process. Finds
their folders, and the cores they allow; memory limits are read in `memory.py`.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from profiler.sensors.kernel_files import read_number, read_words
from profiler.sensors.readings import Reading, smallest


def groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of this process's groups for *controller*, innermost first.

    A limit may stand in any of them. In a container the path in /proc/self/cgroup can be that of
    the host, which is not mounted there; the folders that do not exist are left out, and the top
    one, which then is the container's own, remains.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            folders += _upwards(root / "sys/fs/cgroup" / controller, path)
        elif not controllers:
            folders += _upwards(root / "sys/fs/cgroup", path)
    return [folder for folder in folders if folder.is_dir()]


def _upwards(mount: Path, path: str) -> list[Path]:
    # A group outside our namespace is written with leading "..".
    parts = [part for part in PurePosixPath(path.lstrip("/")).parts if part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def allowed_cores(root: Path = Path("/")) -> Reading:
    """Return the cores that this process may keep busy; a quota can be a fraction of one."""
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
