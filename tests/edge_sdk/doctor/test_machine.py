"""The machine as the doctor sees it: real boards as trees of files, and a disk of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_sdk.doctor import machine
from profiler.sensors.sources import Nvml, Sources
from tests.boards import BOARDS, build
from tests.boards.nvml import no_library
from tests.boards.tree import MIB, meminfo, swaps, write


def made(root: Path, **files: str) -> Sources:
    """A machine that consists of *files*; `__` stands for a slash."""
    write(root, {name.replace("__", "/"): text for name, text in files.items()})
    return Sources(root, Nvml(no_library()))


def with_memory(root: Path, total_mib: int, available_mib: int) -> Sources:
    """A machine with so much memory, of which this process holds 100 MiB."""
    write(root, meminfo(1024 * total_mib, 1024 * available_mib))
    return Sources(root, Nvml(no_library()))


def test_a_32_bit_python_is_useless() -> None:
    """There are no libraries to compute with; a 64-bit one is fine and shown."""
    bad, good = machine.check_python(bits=32, machine="armv7l"), machine.check_python(bits=64)

    assert bad.status == "failure"
    assert "64-bit" in bad.cure
    assert good.status == "ok"


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_every_board_is_named_and_has_memory(name: str, tmp_path: Path) -> None:
    """On each board that we know nothing fails: name, memory and swap are read."""
    sources = build(name, tmp_path).sources

    found = [
        machine.check_board(sources),
        machine.check_memory(sources, hogs=list),
        machine.check_swap(sources),
        machine.check_heat(sources),
    ]

    assert not [finding for finding in found if finding.status == "failure"], found
    assert str(BOARDS[name].values.get("board", "unknown board")) in found[0].text


def test_a_jetson_in_a_container_is_told_what_to_mount(tmp_path: Path) -> None:
    """Without its release nobody knows which torch fits it."""
    board = build("orin_nano_jp6", tmp_path)
    (board.root / "etc/nv_tegra_release").unlink()

    finding = machine.check_board(board.sources)

    assert finding.status == "warning"
    assert "-v /etc/nv_tegra_release" in finding.cure


def test_a_weak_power_supply_is_the_cause_and_not_the_heat(tmp_path: Path) -> None:
    """A Pi that was throttled by its supply is told so; a Jetson at work is fine."""
    pi = machine.check_heat(build("raspberry_pi_5", tmp_path / "pi").sources)
    orin = machine.check_heat(build("orin_nano_jp6", tmp_path / "orin").sources)
    thor = machine.check_heat(build("thor_jp7", tmp_path / "thor").sources)
    nothing = machine.check_heat(made(tmp_path / "none"))

    assert (pi.status, pi.text) == ("warning", "81 C, it runs slower now: clock capped")
    assert (orin.status, orin.text) == ("ok", "53 C, not throttled")
    assert (thor.status, thor.cure) == ("warning", "cool it: fan, air")
    assert nothing.status == "skipped"


@pytest.mark.parametrize(
    ("available", "status"), [(7000, "ok"), (1200, "warning"), (500, "failure")]
)
def test_memory_is_judged_by_what_a_run_may_take(
    available: int, status: str, tmp_path: Path
) -> None:
    """The budget of the profiler decides; who holds the rest is named, small ones are not."""
    sources = with_memory(tmp_path, 8000, available)
    hogs = [("gnome-shell", 410 * MIB), ("bash", 3 * MIB)]

    finding = machine.check_memory(sources, hogs=lambda: hogs)

    assert finding.status == status
    assert f"{available + 100 - 400:,} MiB of 8,000 MiB for a run" in finding.text
    assert f"others hold {8000 - available - 100:,} MiB (gnome-shell 410 MiB)" in finding.text
    assert bool(finding.cure) == (status != "ok")


def test_a_budget_set_by_hand_must_be_possible(tmp_path: Path) -> None:
    """More than there is fails; more than is free now is a warning."""
    sources = with_memory(tmp_path, 8000, 2000)

    assert machine.check_memory(sources, by_hand=9000 * MIB, hogs=list).status == "failure"
    assert machine.check_memory(sources, by_hand=4000 * MIB, hogs=list).status == "warning"
    assert machine.check_memory(sources, by_hand=1500 * MIB, hogs=list).status == "ok"


def test_memory_of_the_gpu_counts_where_it_computes(tmp_path: Path) -> None:
    """Of a graphics card its own memory, of a Jetson the one that all share, NvMap named."""
    card = build("rtx_laptop", tmp_path / "card").sources
    orin = build("orin_nano_jp6", tmp_path / "orin").sources

    assert "of the GPU for a run" in machine.check_memory(card, on_gpu=True, hogs=list).text
    assert "600 MiB through the GPU" in machine.check_memory(orin, on_gpu=True, hogs=list).text


def test_the_biggest_processes_are_real() -> None:
    """At most three, none of them this one, largest first."""
    found = machine.biggest_processes()

    assert len(found) <= 3
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True)


def test_swap_and_zram_are_told_apart(tmp_path: Path) -> None:
    """None is fine, some is fine, living on it is not."""
    area = ("/dev/zram0", 1024 * 1024, 900 * 1024)
    idle = ("/var/swap", 1024 * 1024, 0)
    full, calm, none = (tmp_path / name for name in ("full", "calm", "none"))
    write(full, swaps(area))
    write(calm, swaps(idle, ("/dev/zram0", 1024 * 1024, 1024)))
    write(none, swaps())

    found = [machine.check_swap(Sources(one, Nvml(no_library()))) for one in (full, calm, none)]

    assert [finding.status for finding in found] == ["warning", "ok", "ok"]
    assert found[1].text == "1,024 MiB on disk and 1,024 MiB of zram, 1 MiB in use"


def test_a_folder_need_not_exist_but_must_be_possible(tmp_path: Path) -> None:
    """It is not made; where it would be must be a folder that can be written."""
    file = tmp_path / "file"
    file.write_text("")

    fine = machine.check_disk("state", tmp_path / "a" / "b", lambda _: 10**12)
    behind = machine.check_disk("cache", file / "parts")

    assert fine.status == "ok"
    assert not (tmp_path / "a").exists()
    assert list(tmp_path.iterdir()) == [file]
    assert (behind.check, behind.status) == ("disk (cache)", "failure")


def test_a_folder_that_takes_no_files_is_a_failure() -> None:
    """The command that makes it ours is named; in /proc not even root makes a file."""
    finding = machine.check_disk("state", Path("/proc/edge-state"))

    assert finding.status == "failure"
    assert finding.cure == "sudo chown -R $USER /proc, or name another folder: state=..."


def test_a_read_only_disk_is_a_failure(tmp_path: Path) -> None:
    """Whatever the system says while writing is in the line."""

    def no_room(_folder: Path) -> int:
        raise OSError(30, "Read-only file system")

    finding = machine.check_disk("state", tmp_path, no_room)

    assert finding.status == "failure"
    assert finding.text.endswith("Read-only file system")


@pytest.mark.parametrize(
    ("left", "status"), [(50 * MIB, "failure"), (500 * MIB, "warning"), (3000 * MIB, "ok")]
)
def test_room_on_the_disk_is_judged(left: int, status: str, tmp_path: Path) -> None:
    """Too little for checkpoints fails, too little for a model's parts warns."""
    assert machine.check_disk("cache", tmp_path, lambda _: left).status == status


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        ({"files": 1024, "locked": 8 * MIB, "address space": None}, "ok"),
        ({"files": None, "locked": None, "address space": None}, "ok"),
        ({"files": 256, "locked": 0, "address space": None}, "warning"),
        ({"files": 64, "locked": 0, "address space": None}, "failure"),
        ({"files": 1024, "locked": 0, "address space": 4096 * MIB}, "warning"),
    ],
)
def test_limits_of_the_shell(limits: dict[str, int | None], status: str) -> None:
    """Few files, or a limit to address space, break libraries in odd places."""
    finding = machine.check_limits(limits)

    assert finding.status == status
    assert ("ulimit" in finding.cure) == (status != "ok")


def test_a_clock_without_a_battery() -> None:
    """1970 is no failure: runs use another clock; today is fine."""
    assert machine.check_clock(3600.0).status == "warning"
    assert machine.check_clock(1.8e9).status == "ok"
    assert machine.check_clock(3600.0).cure == "sudo timedatectl set-ntp true"


def test_nobody_holds_more_than_all_others_together(tmp_path: Path) -> None:
    """Processes under another limit, such as those outside of a container, are not named."""
    sources = with_memory(tmp_path, 8000, 7000)
    hogs = [("elsewhere", 901 * MIB), ("here", 300 * MIB), ("too", 700 * MIB)]

    text = machine.check_memory(sources, hogs=lambda: hogs).text

    assert text.endswith("; others hold 900 MiB (here 300 MiB)")


FORKED = """
import os, sys
held = os.urandom({size})
for _ in range({count}):
    if os.fork() == 0:
        break
os.write(1, b"there\\n")
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell what is shared")
def test_what_processes_share_counts_once() -> None:
    """Copies of a process by fork, which wrote nothing since, hold little more than one of them."""
    size, count = 64 * MIB, 4
    with subprocess.Popen(
        [sys.executable, "-c", FORKED.format(size=size, count=count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        for _ in range(count + 1):
            assert program.stdout.readline() == "there\n"
        first = psutil.Process(program.pid)
        family = [first, *first.children()]
        alone = sum(machine.own_bytes(process) for process in family)
        resident = sum(process.memory_info().rss for process in family)
        program.stdin.close()

    assert len(family) == count + 1
    assert resident > len(family) * size
    assert size < alone < 2 * size


def test_a_process_that_ends_while_it_is_looked_at_holds_nothing() -> None:
    """On a busy machine some always do; it is no error of the doctor."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as program:
        seen = psutil.Process(program.pid)
        program.kill()

    assert machine.own_bytes(seen) == 0
