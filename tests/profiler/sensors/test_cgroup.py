"""Cores that a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.sensors.cgroup import allowed_cores


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    """A process bound to some cores may use those."""
    reading = allowed_cores(tmp_path)

    assert reading.value is not None
    assert reading.value >= 1
    assert reading.unit == "cores"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/box", {"box/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/box", {"box/cpu.max": "max 100000\n", "cpu.max": "25000 100000\n"}, 0.25),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "10000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.1),
    ],
)
def test_a_quota_counts(tmp_path: Path, group: str, files: dict[str, str], expected: float) -> None:
    """A quota of any group around the process holds, in either version of control groups."""
    for name, text in {"proc/self/cgroup": group, **files}.items():
        path = tmp_path / name if name.startswith("proc") else tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert allowed_cores(tmp_path).value == expected


def test_no_quota_of_version_1_is_no_quota(tmp_path: Path) -> None:
    """Version 1 writes -1 where there is no quota."""
    folder = tmp_path / "sys/fs/cgroup/cpu"
    folder.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/\n")
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")

    assert allowed_cores(tmp_path) == allowed_cores(tmp_path / "nowhere")
