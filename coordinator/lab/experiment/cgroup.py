"""Control groups that limit emulated boards in memory and cores.

Versions 1 and 2, as root or in a delegated subtree. Knows no board; the processes enter by
themselves (`supervisor.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import DeviceError
from profiler.sensors.cgroup import groups

# Short periods let a slow board answer messages in time; the kernel wants a quota of 1 ms or more.
PERIODS_US = (20_000, 100_000)
LEAST_QUOTA_US = 1000
LEAST_CORES = LEAST_QUOTA_US / PERIODS_US[-1]
# Seconds that the kernel may need after the last process has gone.
REMOVE_S = 3.0
_MARKS = {"memory": "memory.usage_in_bytes", "cpu": "cpu.shares"}


class CgroupLimits:
    """The groups of one board. Raises DeviceError without the rights to make them.

    Args:
        name: Name of the groups, unique on this machine.
        memory_bytes: Limit of memory in bytes, swap included where the kernel counts it.
        cores: Cores that they may use; may be below 1.
        root: Folder of /proc and /sys, for tests.
    """

    def __init__(
        self, name: str, *, memory_bytes: float, cores: float, root: Path = Path("/")
    ) -> None:
        self._memory = self._cpu = Path()
        self.folders: list[Path] = []
        try:
            self._memory, self._cpu = self._make_groups(name, root)
            self._limit_memory(int(memory_bytes))
            self.set_cores(cores)
        except OSError as error:
            self.remove()
            raise DeviceError(f"cannot limit {name}: {error.strerror}") from error
        except DeviceError:
            self.remove()
            raise

    def _make_groups(self, name: str, root: Path) -> tuple[Path, Path]:
        """Make the groups that limit memory and CPU time; they may be one."""
        memory, cpu = (_parents(controller, root) for controller in _MARKS)
        if memory and cpu and all(_has_v2_files(parent) for parent in (*memory, *cpu)):
            # A process is in one group of version 2: both limits stand there.
            both = [parent for parent in memory if parent in cpu]
            folder = self._make(("memory", "cpu"), name, both)
            return folder, folder
        return self._make(("memory",), name, memory), self._make(("cpu",), name, cpu)

    def _make(self, controllers: tuple[str, ...], name: str, parents: Sequence[Path]) -> Path:
        """Make a group below our own, or below its nearest parent where we may."""
        what, reasons = " and ".join(controllers), []
        for parent in parents:
            folder = parent / name
            try:
                if _has_v2_files(parent):
                    for controller in controllers:
                        _delegate(parent, controller)
                folder.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            self.folders.append(folder)
            return folder
        is_one = len(controllers) == 1
        none = f"the {what} controller is not mounted" if is_one else "no group offers both"
        why = "; ".join(reasons) or none
        raise DeviceError(f"cannot make a control group for {what}: {why}")

    def _limit_memory(self, num_bytes: int) -> None:
        if _is_v2(self._memory):
            _write(self._memory / "memory.max", num_bytes)
            _write_if_there(self._memory / "memory.swap.max", 0)
        else:
            _write(self._memory / "memory.limit_in_bytes", num_bytes)
            _write_if_there(self._memory / "memory.memsw.limit_in_bytes", num_bytes)

    def set_cores(self, cores: float) -> None:
        """Limit the CPU time to so many seconds a second."""
        period_us = PERIODS_US[cores * PERIODS_US[0] < LEAST_QUOTA_US]
        quota_us = max(LEAST_QUOTA_US, round(cores * period_us))
        if _is_v2(self._cpu):
            _write(self._cpu / "cpu.max", f"{quota_us} {period_us}")
            return
        # The quota must fit the period at every moment in between.
        _write(self._cpu / "cpu.cfs_quota_us", -1)
        _write(self._cpu / "cpu.cfs_period_us", period_us)
        _write(self._cpu / "cpu.cfs_quota_us", quota_us)

    def peak_bytes(self) -> int | None:
        """Return the most memory that its processes held together, page cache included."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                return int((self._memory / name).read_text())
        return None

    def num_killed(self) -> int:
        """Return how many processes the kernel has ended because of the memory limit."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                pairs = (line.split() for line in (self._memory / name).read_text().splitlines())
                return next((int(pair[1]) for pair in pairs if pair[0] == "oom_kill"), 0)
        return 0

    def remove(self) -> None:
        """Remove the groups; their processes must have ended."""
        until_s = time.monotonic() + REMOVE_S
        for folder in self.folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError as error:
                    if time.monotonic() > until_s:
                        raise DeviceError(f"cannot remove {folder}: {error.strerror}") from error
                    time.sleep(0.02)
        self.folders.clear()


def _parents(controller: str, root: Path) -> list[Path]:
    """Return our groups below which others may have *controller*, innermost first."""
    return [folder for folder in groups(controller, root) if _is_group(folder, controller)]


def _has_v2_files(folder: Path) -> bool:
    return (folder / "cgroup.controllers").exists()


def _is_group(folder: Path, controller: str) -> bool:
    """Return whether groups of *controller* can lie below *folder*."""
    if (folder / _MARKS[controller]).exists():
        return True
    with contextlib.suppress(OSError):
        return controller in (folder / "cgroup.controllers").read_text().split()
    return False


def _delegate(parent: Path, controller: str) -> None:
    """Let groups below *parent* have *controller*; the kernel refuses if it holds processes."""
    below = parent / "cgroup.subtree_control"
    if controller not in below.read_text().split():
        _write(below, f"+{controller}")


def _is_v2(folder: Path) -> bool:
    return _has_v2_files(folder.parent)


def _write(file: Path, value: object) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} writing {value} to {file.name}") from error


def _write_if_there(file: Path, value: object) -> None:
    if file.exists():
        with contextlib.suppress(OSError):  # not every kernel counts swap
            _write(file, value)
