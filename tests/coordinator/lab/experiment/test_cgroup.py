"""Control groups: real limits where we may set some, both versions' files in a tree of our own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.lab.experiment.cgroup import CgroupLimits
from coordinator.remote.shell import LocalShell, Program
from edge_sdk.errors import DeviceError

MIB = 2**20
LIMIT_BYTES = 256 * MIB
PATIENCE_S = 30.0


@pytest.fixture
def limits() -> Iterator[CgroupLimits]:
    """Real groups; skipped where we may make none."""
    try:
        made = CgroupLimits(f"edgesplit-test-{os.getpid()}", memory_bytes=LIMIT_BYTES, cores=0.5)
    except DeviceError as error:
        pytest.skip(str(error))
    yield made
    made.remove()


@contextmanager
def running(code: str, limits: CgroupLimits) -> Iterator[tuple[int | None, list[str]]]:
    """A Python program in *cage* that has ended: exit code and lines. The groups go with it."""
    lines: list[str] = []
    program = Program(
        LocalShell(),
        [sys.executable, "-c", code],
        folder=str(Path.cwd()),
        groups=limits.folders,
        on_line=lines.append,
    )
    assert program.wait(PATIENCE_S)
    yield program.exit_code, lines
    program.close()


SEEN = """
from pathlib import Path
from profiler.sensors.cgroup import allowed_cores
from profiler.sensors.memory import memory_info
print(int(memory_info(Path("/")).total.value), allowed_cores(Path("/")).value)
"""


def test_a_program_sees_its_limits(limits: CgroupLimits) -> None:
    """What our own profiler reads inside is what was set outside."""
    with running(SEEN, limits) as found:
        assert found == (0, [f"{LIMIT_BYTES} 0.5"])


def test_cores_can_change(limits: CgroupLimits) -> None:
    """Down to a hundredth of one, and up again."""
    found = []
    for cores in (0.01, 2.0, 0.3):
        limits.set_cores(cores)
        found.append(_quota(limits))

    assert found == [0.01, 2.0, 0.3]


def _quota(limits: CgroupLimits) -> float:
    """Cores, as the kernel has them."""
    for folder in limits.folders:
        if (folder / "cpu.max").exists():
            words = (folder / "cpu.max").read_text().split()
        elif (folder / "cpu.cfs_quota_us").exists():
            words = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        else:
            continue
        return int(words[0]) / int(words[1])
    raise AssertionError("no quota")


def test_a_program_within_its_memory_is_left_alone(limits: CgroupLimits) -> None:
    """Nothing is counted, and its peak is known."""
    with running(f"x = bytearray({LIMIT_BYTES // 2})", limits) as (code, _):
        peak = limits.peak_bytes()
        assert (code, limits.num_killed()) == (0, 0)
        assert peak is not None
        assert LIMIT_BYTES // 2 <= peak <= LIMIT_BYTES


def test_a_program_that_takes_more_memory_is_ended_and_counted(limits: CgroupLimits) -> None:
    """The kernel ends it, and says so."""
    with running(f"x = bytearray({4 * LIMIT_BYTES})", limits) as (code, _):
        assert (code, limits.num_killed()) == (-9, 1)


def test_the_groups_go_with_the_program(limits: CgroupLimits) -> None:
    """Its supervisor removes them, also when nobody asks; removing them again does nothing."""
    folders = list(limits.folders)
    with running("pass", limits):
        assert [folder.is_dir() for folder in folders] == [True] * len(folders)

    assert [folder.exists() for folder in folders] == [False] * len(folders)
    limits.remove()


# ---- a tree of our own ----


def make_tree(root: Path, delegated: str) -> Path:
    """A machine with version 2 only; we are in /user/session, /user has *delegated*."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/user/session\n")
    inner = root / "sys/fs/cgroup/user/session"
    inner.mkdir(parents=True)
    for folder, below in ((inner, None), (inner.parent, delegated), (inner.parents[1], "")):
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
        control = folder / "cgroup.subtree_control"
        if below is None:  # holds processes: the kernel refuses to write here
            control.mkdir()
        else:
            control.write_text(below)
    return inner.parent


def test_version_2_files(tmp_path: Path) -> None:
    """One group for both controllers, beside ours because ours holds processes."""
    parent = make_tree(tmp_path, "memory")

    limits = CgroupLimits("board", memory_bytes=1e9, cores=0.25, root=tmp_path)

    assert limits.folders == [parent / "board"]
    texts = {path.name: path.read_text() for path in (parent / "board").iterdir()}
    assert texts == {"memory.max": "1000000000", "cpu.max": "5000 20000"}
    assert (parent / "cgroup.subtree_control").read_text() == "+cpu"
    limits.set_cores(0.01)
    assert (parent / "board" / "cpu.max").read_text() == "1000 100000"
    (parent / "board" / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
    (parent / "board" / "memory.peak").write_text("123\n")
    assert (limits.num_killed(), limits.peak_bytes()) == (3, 123)


def test_version_2_limits_stand_in_one_group(tmp_path: Path) -> None:
    """A parent without one of the controllers is passed by: a process is in one group only."""
    parent = make_tree(tmp_path, "memory")
    (parent / "cgroup.controllers").write_text("memory pids\n")

    limits = CgroupLimits("board", memory_bytes=1e9, cores=0.25, root=tmp_path)

    assert limits.folders == [parent.parent / "board"]
    assert (limits.folders[0] / "memory.max").read_text() == "1000000000"
    assert (limits.folders[0] / "cpu.max").read_text() == "5000 20000"


def test_without_a_group_that_offers_both_it_is_said(tmp_path: Path) -> None:
    """Memory here and CPU time there is no place for one process."""
    parent = make_tree(tmp_path, "memory")
    for folder, offers in ((parent / "session", ""), (parent, "memory"), (parent.parent, "cpu")):
        (folder / "cgroup.controllers").write_text(offers)

    with pytest.raises(DeviceError, match="memory and cpu: no group offers both"):
        CgroupLimits("board", memory_bytes=1e9, cores=1.0, root=tmp_path)


def test_without_any_group_it_is_said_why(tmp_path: Path) -> None:
    """A machine without control groups is a clear error, and nothing is left."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("")

    with pytest.raises(DeviceError, match="the memory controller is not mounted"):
        CgroupLimits("board", memory_bytes=1e9, cores=1.0, root=tmp_path)
