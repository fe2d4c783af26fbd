"""`coordinator deploy` over a real ssh to boards on this machine: from nothing to a run, and back.

The boards have no systemd that answers, so devices run as supervised processes; what is said to
systemd is tried in tests/coordinator/fleet.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator import cli
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.errors import ConfigError, DeviceError
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PATIENCE_S, Start, free_port, write_yaml
from tests.e2e.sshd import Sshd, serving_ssh

ROOT = Path(__file__).parents[2]
LIBRARIES = sysconfig.get_paths()["purelib"]


@pytest.fixture
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real sshd, which lets a board's libraries be named."""
    with serving_ssh(tmp_path_factory.mktemp("ssh"), "AcceptEnv PYTHONPATH") as served:
        yield served


@pytest.fixture
def boards(files: Cluster, sshd: Sshd) -> Iterator[Path]:
    """A file of two boards: x gets an environment of its own, on y EdgeSplit is installed."""
    folder = files.folder
    x, y = (board(sshd, folder / name, path) for name, path in (("x", LIBRARIES), ("y", str(ROOT))))
    # The libraries are there; EdgeSplit, which is as well, shall come from the wheel all the same.
    x |= {"extras": [], "packages": ["--no-deps", "--no-index", "--force-reinstall"]}
    x |= {"first": ["--no-index 'pip<1000'"]}
    y |= {"installed": sys.executable}
    settings = ["backend=onnxruntime", "device=cpu", "data.validation_fraction=0.25"]
    path = write_yaml(
        folder / "boards.yaml",
        {
            "config": "run.yaml",
            "wheel": str(made_wheel(folder)),
            "for_all": {"settings": settings, "service": "process", "python": sys.executable},
            "boards": {
                "x": {**x, "data": str(folder / "a.jsonl")},
                "y": {**y, "data": str(folder / "b.jsonl")},
            },
        },
    )
    yield path
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or ()) and "--supervise" in (
            process.info["cmdline"] or ()
        ):
            process.kill()


def board(sshd: Sshd, folder: Path, libraries: str) -> dict[str, Any]:
    """Return how a board is reached, and where its device lies."""
    found = sshd.board(folder)
    options = [*found["ssh_options"], "-o", f"SetEnv=PYTHONPATH={libraries}"]
    return {
        "ssh": found["ssh"],
        "port": found["port"],
        "identity": found["identity"],
        "ssh_options": options,
        "folder": str(folder),
    }


def made_wheel(folder: Path) -> Path:
    """Make the wheel that pip would, without what pip needs for it."""
    version = metadata.version("edgesplit")
    info, rows = f"edgesplit-{version}.dist-info", []
    path = folder / f"edgesplit-{version}-py3-none-any.whl"
    entries = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: edgesplit\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sources = [p for package in ("profiler", "edge_sdk", "coordinator") for p in files_of(package)]
    contents = {str(p.relative_to(ROOT)): p.read_bytes() for p in sources}
    contents |= {name: text.encode() for name, text in entries.items()}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in contents.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}\n")
            wheel.writestr(name, data)
        wheel.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return path


def files_of(package: str) -> list[Path]:
    """Return the files of a package."""
    found = (ROOT / package).rglob("*")
    return [p for p in found if p.is_file() and "__pycache__" not in p.parts]


def deploy(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """Run the command; return its exit code, and what it says of each board."""
    code = cli.main(["deploy", *words])
    said = capsys.readouterr()
    lines = (line.partition(": ") for line in (said.out or said.err).splitlines())
    return code, {name: text for name, _, text in lines}


def snapshot(folder: Path) -> dict[str, int]:
    """Return when each file was written that a deployment writes."""
    moving = ("run.log", "state", "parts")
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not set(path.relative_to(folder).parts) & set(moving)
    }


def test_boards_from_nothing_to_a_run_and_back(
    files: Cluster, boards: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looked at, brought, enrolled, started, left alone, changed, stopped, and nothing is left."""
    places = [files.folder / name for name in "xy"]
    code, said = deploy(capsys, str(boards), "--check")
    assert (code, [place.exists() for place in places]) == (0, [False, False])
    assert said["x"].startswith("would install EdgeSplit, make and register a key, bring the data")
    assert said["y"].startswith("would make and register a key, bring the data, write the config")

    coordinator = start("coordinator", "serve", "--config", "run.yaml", "rounds=500")
    coordinator.wait_for("listening at")
    code, said = deploy(capsys, str(boards))
    assert code == 0, said
    for name, first in (("x", "installed, key enrolled"), ("y", "key enrolled")):
        assert said[name].startswith(f"{first}, data brought, config written, doctor "), said
        assert said[name].endswith("started (process)")
    coordinator.wait_for("x: ready")
    coordinator.wait_for("y: ready")
    coordinator.wait_for("round 1")
    assert list((places[0]).glob("venv-*/lib/python3*/site-packages/edge_sdk/cli.py"))
    assert oct((places[0] / "device.key").stat().st_mode & 0o777) == "0o600"

    before = [snapshot(place) for place in places]
    code, said = deploy(capsys, str(boards))
    assert (code, set(said.values())) == (0, {"unchanged, running (process)"})
    assert [snapshot(place) for place in places] == before

    code, said = deploy(capsys, str(boards), "--only", "y", "boards.y.settings=[threads=1]")
    assert code == 0
    assert said["y"].startswith("config written, doctor ")
    assert "threads: 1" in (places[1] / "device.yaml").read_text()

    assert deploy(capsys, str(boards), "--status")[1]["x"].startswith("active (process): ")
    assert deploy(capsys, str(boards), "--stop") == (0, {"x": "stopped", "y": "stopped"})
    assert deploy(capsys, str(boards), "--status")[1]["y"] == "inactive (process): ended: stopped"
    gone = {"x": "removed, key unregistered", "y": "removed, key unregistered"}
    assert deploy(capsys, str(boards), "--remove") == (0, gone)
    assert [place.exists() for place in places] == [False, False]
    assert set(AllowList(files.allowed).devices()) == {"a", "b", "c"}
    assert set(deploy(capsys, str(boards), "--remove")[1].values()) == {"nothing there"}


def test_one_bad_board_holds_nobody_up(
    files: Cluster, boards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error is that board's line, with its cure; the others go on; the exit code tells."""
    away = f"boards.x.port={free_port()}"

    code, said = deploy(capsys, str(boards), "--check", away)
    assert code == DeviceError.exit_code
    assert said["x"].startswith("cannot be reached: ")
    assert "; try it by hand: ssh " in said["x"]
    assert said["y"].startswith("would ")

    (files.folder / "y").mkdir()
    (files.folder / "y" / "thesis.txt").touch()
    code, said = deploy(capsys, str(boards), "--only", "y")
    assert code == DeviceError.exit_code
    assert said["y"].endswith("is there and is no device's; name another folder")
    code, said = deploy(capsys, str(boards), "--only", "y", "--remove")
    assert (code, said["y"].endswith("it is left alone")) == (DeviceError.exit_code, True)
    assert (files.folder / "y" / "thesis.txt").exists()


def test_ctrl_c_waits_for_no_board(boards: Path, start: Start) -> None:
    """One that takes a connection and says nothing is left alone at once; exit code 130."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        port = silent.getsockname()[1]
        program = start(
            "coordinator", "deploy", str(boards), "--only", "x", f"boards.x.port={port}"
        )
        connection, _ = silent.accept()
        began_s = time.monotonic()
        program.interrupt()

        assert program.wait() == 130, program.text
        assert time.monotonic() - began_s < 5.0
        assert "x: `" in program.text
        assert "was stopped" in program.text
        connection.close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "z"], "no board is called 'z' in this file; it has x, y"),
        (["boards.y.settings=[bakend=torch]"], "boards.y.settings: "),
        (["boards.y.settings=[nonsense]"], "'nonsense' is no key=value"),
        (["boards.x.data=missing.jsonl"], "missing.jsonl is no file"),
        (["boards.x.folder=.."], "folder must be one of its own"),
        (["boards.x.ssh="], "boards.x.ssh is missing"),
        (["config=null", "secret_key=nowhere.key"], "nowhere.key"),
        (["address=192.168.1.10"], "address must be tcp://HOST:PORT"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_before_any_board_is_touched(
    words: list[str], told: str, boards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the key, and the exit code of configurations."""
    code = cli.main(["deploy", str(boards), *words])

    said = capsys.readouterr().err
    assert code == ConfigError.exit_code
    assert told in said
    assert len(said.splitlines()) == 1
