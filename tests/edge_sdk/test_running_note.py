"""A device finds out whether the kernel killed it for memory, and takes nothing else for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.running_note import NAME, RunningNote
from profiler.sensors.memory import OomKills, oom_kills

GROUP_1 = "sys/fs/cgroup/memory/unit"
GROUP_2 = "sys/fs/cgroup/unit"


def machine(root: Path, *, boot: str = "one", group: int | None = 0, total: int | None = 0) -> Path:
    """Build a machine with a group of version 1, or without; None: that count is not there."""
    files = {"proc/sys/kernel/random/boot_id": f"{boot}\n", "proc/self/cgroup": "4:memory:/unit\n"}
    if group is not None:
        text = f"oom_kill_disable 0\nunder_oom 0\noom_kill {group}\n"
        files[f"{GROUP_1}/memory.oom_control"] = text
    files["proc/vmstat"] = "nr_free_pages 7\n" + ("" if total is None else f"oom_kill {total}\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("before", "after", "is_killed"),
    [
        ({}, {}, False),  # somebody's kill -9, a crash
        ({}, {"group": 1, "total": 1}, True),
        ({}, {"group": 0, "total": 1}, False),  # somebody else's process
        ({"group": 3, "total": 3}, {"group": 3, "total": 3}, False),
        ({}, {"boot": "two", "group": 1, "total": 1}, False),  # a power cut
        ({"group": None}, {"group": None, "total": 1}, True),  # no groups: the machine's count
        ({"group": None, "total": None}, {"group": None, "total": 1}, False),  # unknown
        ({"boot": ""}, {"boot": "", "group": 1}, False),
    ],
)
def test_only_a_risen_count_is_evidence(
    tmp_path: Path, before: dict[str, int], after: dict[str, int], is_killed: bool
) -> None:
    """Of this start of the machine, and of the device's own group where that is counted."""
    root = machine(tmp_path, **before)  # type: ignore[arg-type]
    note = RunningNote(tmp_path / "state", root)
    note.write("3 blocks")
    machine(tmp_path, **after)  # type: ignore[arg-type]

    assert note.short_while() == ("3 blocks" if is_killed else "")


def test_a_group_that_was_made_anew_is_another_one(tmp_path: Path) -> None:
    """Systemd makes a unit's group anew with each start: then the machine's count decides."""
    root = machine(tmp_path, group=0, total=5)
    note = RunningNote(tmp_path / "state", root)
    note.write("3 blocks")
    (root / GROUP_1).rename(root / "sys/fs/cgroup/memory/old")

    machine(tmp_path, group=0, total=6)

    assert note.short_while() == "3 blocks"


def test_want_of_memory_that_nobody_could_be_told_of_is_told_later(tmp_path: Path) -> None:
    """Whatever the counts say, also after a power cut."""
    root = machine(tmp_path)
    note = RunningNote(tmp_path / "state", root)
    note.write("3 blocks", was_short=True)
    machine(tmp_path, boot="two")

    assert note.short_while() == "3 blocks"


def test_who_ended_in_order_was_not_killed(tmp_path: Path) -> None:
    """A note is gone with the run, and a folder without one says nothing."""
    root = machine(tmp_path)
    note = RunningNote(tmp_path / "state", root)
    note.write("3 blocks")
    note.remove()
    note.remove()
    machine(tmp_path, group=1, total=1)

    assert note.short_while() == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"doing": 1, "boot": "one"}'])
def test_a_damaged_note_says_nothing(tmp_path: Path, text: str) -> None:
    """Whatever a power cut has left of it."""
    root = machine(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / NAME).write_text(text)

    assert RunningNote(tmp_path / "state", root).short_while() == ""


def test_groups_of_version_2_are_counted_without_those_below(tmp_path: Path) -> None:
    """`memory.events.local` where there is one."""
    root = machine(tmp_path, total=9)
    (root / "proc/self/cgroup").write_text("0::/unit\n")
    (root / GROUP_2).mkdir()
    (root / GROUP_2 / "memory.events").write_text("max 5\noom 3\noom_kill 3\n")
    group = f"/{GROUP_2} {(root / GROUP_2).stat().st_ino}"

    assert oom_kills(root) == OomKills("one", group, 3, 9)
    (root / GROUP_2 / "memory.events.local").write_text("max 5\noom 1\noom_kill 1\n")
    assert oom_kills(root) == OomKills("one", group, 1, 9)


def test_this_machine_is_read_without_an_error() -> None:
    """Whatever it has; twice the same."""
    assert oom_kills() == oom_kills()
