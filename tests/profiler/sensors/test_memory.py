"""Memory, on fake machines and on this one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from profiler.sensors.memory import memory_info, peak_rss, reset_peak_rss, return_freed, rss
from profiler.sensors.readings import Reading, unknown

MIB = 2**20


def machine(root: Path, files: dict[str, str]) -> Path:
    """Build a fake machine of 4096 MiB, 3072 of them available, with *files* added."""
    meminfo = f"MemTotal: {4096 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {3072 * 1024} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_groups_the_host_counts(tmp_path: Path) -> None:
    """No control groups: what the kernel says of the whole machine."""
    info = memory_info(machine(tmp_path, {}))

    assert info.total == Reading(4096 * MIB, "/proc/meminfo MemTotal", "B")
    assert info.available == Reading(3072 * MIB, "/proc/meminfo MemAvailable", "B")


def test_a_limit_of_version_2_anywhere_above_counts(tmp_path: Path) -> None:
    """The limit of an outer group holds, and file cache that can be dropped is no usage."""
    group = "sys/fs/cgroup/outer"
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        f"{group}/inner/memory.max": "max\n",
        f"{group}/memory.max": f"{1024 * MIB}\n",
        f"{group}/memory.current": f"{700 * MIB}\n",
        f"{group}/memory.stat": f"anon 1\ninactive_file {100 * MIB}\n",
    }

    info = memory_info(machine(tmp_path, files))

    assert info.total == Reading(1024 * MIB, f"/{group}/memory.max", "B")
    assert info.available == Reading(424 * MIB, f"/{group}/memory.max less usage", "B")


def test_the_lower_of_two_limits_of_a_group_counts(tmp_path: Path) -> None:
    """memory.high throttles before memory.max kills; usage beyond it leaves nothing."""
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{1024 * MIB}\n",
        "sys/fs/cgroup/memory.high": f"{512 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{600 * MIB}\n",
    }

    info = memory_info(machine(tmp_path, files))

    assert info.total.source == "/sys/fs/cgroup/memory.high"
    assert info.available.value == 0


def test_a_limit_of_version_1_counts(tmp_path: Path) -> None:
    """Version 1 has other names, and subtracts the cache of the groups below as well."""
    group = "sys/fs/cgroup/memory/box"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n0::/\n",
        f"{group}/memory.limit_in_bytes": f"{1024 * MIB}\n",
        f"{group}/memory.usage_in_bytes": f"{300 * MIB}\n",
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
    }

    info = memory_info(machine(tmp_path, files))

    assert info.total.value == 1024 * MIB
    assert info.available.value == 824 * MIB


def test_no_limit_of_version_1_is_no_limit(tmp_path: Path) -> None:
    """The huge number that version 1 writes for `none` is not taken for a limit."""
    files = {
        "proc/self/cgroup": "4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1\n",
    }

    assert memory_info(machine(tmp_path, files)).available.value == 3072 * MIB


def test_in_a_container_the_hosts_path_is_not_mounted(tmp_path: Path) -> None:
    """A path that leads nowhere falls back to the top folder, which is the container's own."""
    files = {
        "proc/self/cgroup": "0::/../../system.slice/abc\n",
        "sys/fs/cgroup/memory.max": f"{256 * MIB}\n",
        "sys/fs/cgroup/memory.current": "0\n",
    }

    assert memory_info(machine(tmp_path, files)).available.value == 256 * MIB


def test_unknown_is_none(tmp_path: Path) -> None:
    """A machine that tells nothing has unknown memory, not none at all."""
    info = memory_info(tmp_path)

    assert info == (unknown("B"), unknown("B"))
    assert rss(tmp_path) == unknown("B")
    assert peak_rss(tmp_path) == unknown("B")
    assert not reset_peak_rss(tmp_path)


def test_a_process_is_read_from_its_status(tmp_path: Path) -> None:
    """Resident memory and its peak come from /proc, in bytes; a reset writes 5."""
    files = {
        "proc/self/status": "Name: x\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n",
        "proc/self/clear_refs": "",
    }
    root = machine(tmp_path, files)

    assert rss(root) == Reading(MIB, "/proc/self/status VmRSS", "B")
    assert peak_rss(root) == Reading(2 * MIB, "/proc/self/status VmHWM", "B")
    assert reset_peak_rss(root)
    assert (root / "proc/self/clear_refs").read_text() == "5"


def test_this_process_has_a_peak_that_can_be_reset() -> None:
    """On a real kernel the peak follows an allocation up and, after a reset, back down."""
    if not os.access("/proc/self/clear_refs", os.W_OK) or not reset_peak_rss():
        pytest.skip("this kernel does not let a process reset its peak")
    return_freed()  # else the block may lie where this process has kept what others needed
    reset_peak_rss()
    before = peak_rss().value or 0

    block = bytearray(os.urandom(64 * MIB))
    with_block = peak_rss().value or 0
    del block
    reset_peak_rss()
    after = peak_rss().value or 0

    assert with_block > before + 48 * MIB
    assert after < with_block - 48 * MIB


class Ring:
    """Refers to itself, and holds memory."""

    def __init__(self) -> None:
        self.held, self.me = bytearray(MIB), self


def test_freed_memory_goes_back_to_the_system() -> None:
    """Also that of objects which refer to themselves, and what the allocator would keep."""
    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]  # too small for maps of their own
    last = bytearray(b"x" * 100_000)  # keeps the heap from shrinking by itself
    gone = weakref.ref(Ring())
    full = rss().value
    del blocks

    return_freed()

    assert gone() is None
    left = rss().value
    assert full is not None
    assert left is not None
    assert full - left > 50 * MIB or not hasattr(ctypes.CDLL(None), "malloc_trim")
    assert len(last) == 100_000


KEEPS = """
import sys
import threading
from profiler.sensors.memory import keep_freed, return_freed, rss

def fill():
    for _ in range(3):
        blocks = [b"x" * (1 << 20) for _ in range(200)]
        full.append(rss().value)
        del blocks
        left.append(rss().value)

full, left = [], []
if "keep" in sys.argv:
    keep_freed()
thread = threading.Thread(target=fill)
thread.start() if "thread" in sys.argv else fill()
thread.join() if "thread" in sys.argv else None
return_freed()
print(max(full), left[-1], rss().value)
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_process_keeps_what_it_frees_until_it_is_asked(where: str) -> None:
    """What a step has freed is there for the next one, in any thread, and goes back on demand."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")

    full, left, at_last = run_keeps(where, "keep")
    without = run_keeps(where, "plain")

    assert full - left < 20 * MIB
    assert full - at_last > 150 * MIB
    # The heap of another thread keeps as much of its own accord, or not, as its blocks lie.
    assert where == "thread" or without[0] - without[1] > 150 * MIB


def run_keeps(*arguments: str) -> list[int]:
    """Return bytes of a process: at most, when all is freed, and when that is given back."""
    command = [sys.executable, "-c", KEEPS, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(float(number)) for number in output.split()]
