"""Experiments with real processes: emulated boards with real limits, and boards behind ssh."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.lab.experiment.cgroup import CgroupLimits
from coordinator.lab.experiment.namespace import FOLDER, Namespace
from edge_sdk.deadline import Deadline
from edge_sdk.errors import DeviceError
from tests.e2e.cluster import sentences, write_rows
from tests.e2e.programs import Program, free_port, write_yaml
from tests.e2e.sshd import Sshd, serving_ssh

PATIENCE_S = 240.0
MEMORY_BYTES = 1_500_000_000
# Devices without torch start in a fraction of the time.
LIGHT = ["backend=onnxruntime"]


def experiment(folder: Path, model: Path, boards: dict[str, Any], **settings: Any) -> Path:
    """Write an experiment of two rounds; every board has texts of its own."""
    for name, board in boards.items():
        path = write_rows(folder / f"{name}.jsonl", sentences(ord(name[0])))
        board |= {"data": str(path), "settings": LIGHT}
    section = {"data": {"validation_fraction": 0.25}, **settings.pop("experiment", {})}
    return write_yaml(
        folder / "experiment.yaml",
        {
            "model": str(model),
            "rounds": 2,
            "steps_per_round": 4,
            "patience_s": 5,
            "device": "cpu",
            "default": {"split": 2, "batch_size": 4, "codec": "float32"},
            "lora": {"r": 4, "lora_alpha": 8},
            "training": {"learning_rate": 1e-2},
            "boards": boards,
            "experiment": section,
            **settings,
        },
    )


def run(folder: Path, *, is_cold: bool = False) -> Program:
    """Start `coordinator experiment run` on the file in *folder*."""
    words = ("experiment", "run", "experiment.yaml")
    return Program("coordinator", *words, cwd=folder, is_cold=is_cold)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one of the run's files."""
    text = (folder / "experiment" / "run" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def leftovers(program: psutil.Process) -> list[psutil.Process]:
    """Everything that a running experiment has started, supervisors and boards among it."""
    return program.children(recursive=True)


def cages() -> list[Path]:
    """Control groups that an experiment would have made."""
    return [
        folder
        for top in Path("/sys/fs/cgroup").glob("*")
        for folder in top.rglob("edgesplit-*")
        if folder.is_dir()
    ]


def has_empty(before: Collection[Path]) -> bool:
    """Return whether a control group that was not there *before* holds no process yet."""
    texts = [(group / "cgroup.procs").read_text() for group in cages() if group not in before]
    return not all(text.strip() for text in texts)


@pytest.fixture
def limits() -> None:
    """Skip where this machine lets us make no control groups."""
    try:
        name = f"edgesplit-test-{os.getpid()}"
        CgroupLimits(name, memory_bytes=MEMORY_BYTES, cores=1.0).remove()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; whatever a test starts in it has ended afterwards, and its groups too."""
    before = cages()
    yield tmp_path
    assert cages() == before


@pytest.mark.usefixtures("limits")
def test_four_emulated_boards_and_everything_that_may_happen_to_them(
    folder: Path, llama: Path
) -> None:
    """A run survives boards that die; they had their limits; a report with real clocks is there."""
    kinds = {"a": "agx-orin-32gb", "b": "orin-nx-16gb", "c": "orin-nano-8gb", "d": "orin-nano-4gb"}
    boards = {
        name: {
            "emulated": kind,
            "link": "4g-good" if name == "c" else "wifi-good",
            "memory_bytes": MEMORY_BYTES,
            "cpu_quota": 0.9 if name != "d" else 0.8,
        }
        for name, kind in kinds.items()
    }
    faults = [
        {"board": "a", "do": "throttle", "factor": 0.5, "at_step": 1},
        {"board": "b", "do": "link", "to": "4g-slow", "at_step": 1, "seconds": 0.5},
        {"board": "b", "do": "cut", "seconds": 0.2, "at_step": 3},
        {"board": "c", "do": "kill", "at_step": 2},
        {"board": "d", "do": "power-cut", "at_step": 5},
    ]
    experiment(folder, llama, boards, faults=faults, experiment={"restarts": 1})

    program = run(folder)
    assert program.wait(PATIENCE_S) == 0, program.text

    told = [(row["who"], row["text"]) for row in rows(folder, "happenings.jsonl")]
    for expected in (
        ("a", "throttle begins"),
        ("b", "link begins"),
        ("b", "link ends"),
        ("b", "cut begins"),
        ("c", "ended by SIGKILL"),
        ("c", "started again"),
        ("d", "power-cut begins"),
        ("d", "ended by SIGKILL"),
        ("a", "ended"),
    ):
        assert expected in told, told
    facts = json.loads((folder / "experiment" / "run" / "boards.json").read_text())
    assert facts["outcome"] == "completed"
    assert [board["killed_for_memory"] for board in facts["boards"].values()] == [0, 0, 0, 0]
    assert facts["boards"]["c"]["starts"] == 2
    assert facts["boards"]["d"]["exits"] == [-9]
    limits = [
        board["board"]["memory_total"]
        for row in rows(folder, "telemetry.jsonl")
        for board in row["devices"].values()
        if "board" in board
    ]
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    assert limits
    assert set(limits) == {MEMORY_BYTES // page_bytes * page_bytes}
    [result] = json.loads((folder / "experiment" / "results.json").read_text())
    assert result["cell"]["points"][-1][5] < result["cell"]["points"][0][5]
    assert [board["energy_is_estimated"] for board in result["boards"]] == [True] * 4
    html = (folder / "experiment" / "report.html").read_text()
    assert "Loss against time" in html
    assert "ended by SIGKILL" in html


@pytest.mark.usefixtures("limits")
def test_boards_in_network_namespaces(folder: Path, llama: Path) -> None:
    """The kernel's own links: a run survives a cut and a power-cut, and what passed is counted."""
    try:
        Namespace(0).close()
    except DeviceError as error:
        pytest.skip(f"no network namespaces here: {error}")
    boards = {
        name: {
            "emulated": "orin-nano-8gb",
            "link": "cable",
            "memory_bytes": MEMORY_BYTES,
            "cpu_quota": 0.9,
        }
        for name in "ab"
    }
    faults = [
        {"board": "a", "do": "cut", "seconds": 0.3, "at_step": 2},
        {"board": "b", "do": "power-cut", "seconds": 1, "at_step": 5},
    ]
    section = {
        "network": "namespaces",
        "links": {"cable": {"up_mbit": 80, "down_mbit": 80, "rtt_ms": 0}},
    }
    experiment(folder, llama, boards, faults=faults, experiment=section)

    program = run(folder)
    assert program.wait(PATIENCE_S) == 0, program.text

    told = [(row["who"], row["text"]) for row in rows(folder, "happenings.jsonl")]
    assert ("a", "cut begins") in told
    assert ("b", "power-cut ends") in told
    facts = json.loads((folder / "experiment" / "run" / "boards.json").read_text())
    assert facts["outcome"] == "completed"
    for name, board in facts["boards"].items():
        assert board["link"]["bytes_up"] > 10_000, name
        assert board["link"]["up_s"] == pytest.approx(board["link"]["bytes_up"] / 1e7)
    assert not list(FOLDER.glob("edgesplit-*"))


def test_a_killed_experiment_leaves_nothing_running(folder: Path, llama: Path) -> None:
    """When the experiment itself is killed, its coordinator and boards end, and their groups go."""
    boards = {"a": {"emulated": "orin-nano-8gb", "cpu_quota": 0.9}}
    experiment(folder, llama, boards, rounds=5000, experiment={"must_limit": False})
    before = set(cages())
    program = run(folder)
    program.wait_for("prepared", PATIENCE_S)
    deadline = Deadline.after(PATIENCE_S)
    # Two supervisors, a coordinator and a board in its groups, where there are some: from then on
    # a supervisor knows of them.
    while len(started := leftovers(psutil.Process(program.pid))) < 4 or has_empty(before):
        assert deadline.left_s(), program.text
        time.sleep(0.02)

    program.kill()
    program.wait()

    _, alive = psutil.wait_procs(started, 30.0)
    assert alive == []
    deadline = Deadline.after(10.0)
    while set(cages()) - before and deadline.left_s():
        time.sleep(0.05)


def test_ctrl_c_stops_everything_and_reports(folder: Path, llama: Path) -> None:
    """After Ctrl-C there is a checkpoint and a report, and exit code 130."""
    boards = {"a": {"emulated": "orin-nano-8gb", "cpu_quota": 0.9}}
    experiment(folder, llama, boards, rounds=5000, experiment={"must_limit": False})
    program = run(folder, is_cold=True)
    program.wait_for("round 1,", PATIENCE_S)
    started = leftovers(psutil.Process(program.pid))

    program.interrupt()

    assert program.wait(60.0) == 130, program.text
    assert [process for process in started if process.is_running()] == []
    assert "interrupted" in program.text
    assert list((folder / "experiment" / "run").glob("checkpoint-*"))
    assert (folder / "experiment" / "report.html").is_file()


# ---- over ssh ----


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    """A real sshd with keys made for the test."""
    with serving_ssh(tmp_path) as served:
        yield served


def test_boards_over_ssh(folder: Path, llama: Path, sshd: Sshd) -> None:
    """Keys, config and data go there; a killed program comes back; nothing of it stays there."""
    places = {name: folder / f"board-{name}" for name in "ab"}
    boards = {name: sshd.board(place) for name, place in places.items()}
    faults = [{"board": "b", "do": "kill", "at_step": 2, "seconds": 0.5}]
    door = f"tcp://127.0.0.1:{free_port()}"
    # Two: the run must not be over before the killed one is back.
    experiment(folder, llama, boards, faults=faults, listen=door, min_devices=2)

    program = run(folder)
    assert program.wait(PATIENCE_S) == 0, program.text

    facts = json.loads((folder / "experiment" / "run" / "boards.json").read_text())
    assert facts["outcome"] == "completed"
    assert facts["boards"]["b"]["exits"] == [-9, 0]
    for place in places.values():
        assert sorted(path.name for path in place.iterdir()) == ["parts"]
    assert "taking part in run" in (folder / "experiment/run/logs/a.log").read_text()
    assert not [
        process
        for process in psutil.process_iter(["cwd"])
        if str(folder) in (process.info["cwd"] or "") and process.pid != os.getpid()
    ]


def test_an_ssh_board_that_is_not_there(folder: Path, llama: Path) -> None:
    """The experiment ends before it begins, in one line that names the board."""
    board = {"ssh": "nobody@127.0.0.1", "port": free_port(), "ssh_options": ["-F", "/dev/null"]}
    experiment(folder, llama, {"a": board})

    program = run(folder)

    assert program.wait(60.0) == 6
    assert program.lines[-1].startswith("coordinator: board a: cannot be reached: ")
