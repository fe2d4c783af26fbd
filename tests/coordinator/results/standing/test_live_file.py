"""The live file is written as things happen, but of many devices no more than it is worth."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from coordinator.results.events.devices import DeviceStatus
from coordinator.results.events.run import FolderKnown
from coordinator.results.run_folder import LIVE
from coordinator.results.standing.live_file import FEW, LiveFile


def told_of(folder: Path, devices: int) -> tuple[LiveFile, int]:
    """A live file that was told of so many devices, and how often it was written."""
    clock = itertools.count(0.0, 0.001)
    watcher, seen = LiveFile(lambda: next(clock)), set()
    watcher.see(FolderKnown(folder))
    for number in range(devices):
        watcher.see(DeviceStatus(f"d{number}", "ready"))
        seen.add((folder / LIVE).stat().st_mtime_ns)
    return watcher, len(seen)


def devices_in(folder: Path) -> int:
    """How many devices stand in the file."""
    return len(json.loads((folder / LIVE).read_bytes())["devices"])


def test_of_a_few_devices_it_is_written_at_once(tmp_path: Path) -> None:
    """Whoever reads it sees the last thing that has happened."""
    _, times = told_of(tmp_path, FEW)

    assert devices_in(tmp_path) == FEW
    assert times > FEW // 2


def test_of_many_devices_it_is_written_now_and_then(tmp_path: Path) -> None:
    """A fleet that joins does not write it for each of its devices; a turn brings the rest."""
    watcher, times = told_of(tmp_path, FEW + 500)

    assert times < FEW + 50
    assert devices_in(tmp_path) < FEW + 500
    for _ in range(2000):
        watcher.turn()
    assert devices_in(tmp_path) == FEW + 500
