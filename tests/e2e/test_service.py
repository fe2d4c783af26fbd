"""A coordinator as services run it: a number without a home, watched, stopped, started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import cli
from edge_sdk.deadline import Deadline
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PATIENCE_S, Start

NOBODYS = 61_235
"""A number that no user of a machine has."""
# Who runs the tests may keep interpreter and model where others cannot look; nothing can be written
# with this right, and an image has none of it.
READS_ALL = "+dac_read_search"
AS_NOBODY = (
    *("setpriv", "--reuid", str(NOBODYS), "--regid", str(NOBODYS), "--clear-groups"),
    *("--inh-caps", READS_ALL, "--ambient-caps", READS_ALL),
)
# What systemd's unit and containers allow at least.
STOP_S = 10.0


class Manager:
    """The end of NOTIFY_SOCKET at which systemd would hear."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.1)
        self.lines: list[str] = []

    def wait_for(self, line: str) -> None:
        """Wait until *line* has been said once more than before."""
        deadline = Deadline.after(PATIENCE_S)
        while deadline.left_s():
            try:
                self.lines += self._socket.recv(4096).decode().splitlines()
            except TimeoutError:
                continue
            if line in self.lines:
                self.lines.remove(line)
                return
        raise AssertionError(f"never heard {line!r}: {self.lines}")

    def close(self) -> None:
        """Hear nothing more."""
        self._socket.close()


@pytest.fixture
def manager(files: Cluster) -> Iterator[Manager]:
    """A service manager that listens in the cluster's folder."""
    made = Manager(files.folder / "notify")
    yield made
    made.close()


def is_well(folder: Path, *words: str) -> bool:
    """Return what `coordinator health` says of a run."""
    return cli.main(["health", str(folder), *words]) == 0


def test_a_service_is_ready_watched_stopped_and_goes_on(
    files: Cluster, start: Start, manager: Manager
) -> None:
    """READY when devices can connect; a frozen loop is seen; SIGTERM drains in time; --resume."""
    told = {"NOTIFY_SOCKET": str(files.folder / "notify"), "WATCHDOG_USEC": "2000000"}
    serve = ("coordinator", "serve", "--config", "run.yaml", "--resume")
    run = files.folder / "runs" / "run"
    first = start(*serve, "rounds=400", **told)
    manager.wait_for("READY=1")
    assert is_well(run)
    devices = [start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab"]
    devices[0].wait_for("round 1")
    manager.lines.clear()
    manager.wait_for("WATCHDOG=1")

    first.freeze()
    deadline = Deadline.after(PATIENCE_S)
    while is_well(run, "--live", "--within", "1"):
        assert deadline.left_s()
        time.sleep(0.1)
    first.thaw()
    began_s = time.monotonic()
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 130
    assert time.monotonic() - began_s < STOP_S
    manager.wait_for("STOPPING=1")
    assert not is_well(run, "--live")

    num_rows = len((run / "metrics.jsonl").read_text().splitlines())
    again = start(*serve, f"rounds={num_rows}", **told)
    again.wait_for("goes on, with the config in its folder")
    assert [program.wait() for program in (again, *devices)] == [0, 0, 0]
    manager.wait_for("STATUS=complete")


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can become another user",
)
def test_a_number_without_a_home_runs_both_sides(files: Cluster) -> None:
    """As `docker run --user 1000:1000`: HOME is `/` or unset, and the system knows no such user."""
    for path in (files.folder, *files.folder.rglob("*")):
        os.chown(path, NOBODYS, NOBODYS)
    lent = Path(tempfile.gettempdir()) / f"edgesplit-home-{NOBODYS}"
    programs = {
        "coordinator": (
            ("serve", "--config", "run.yaml", "min_devices=1", "rounds=1"),
            {"HOME": "/"},
        ),
        "edge-sdk": (("run", "--config", "a.yaml", "cache=null"), {}),
    }

    try:
        running = [_as_nobody(files.folder, name, *how) for name, how in programs.items()]
        codes = [program.wait(PATIENCE_S) for program in running]

        assert codes == [0, 0], [(files.folder / f"{name}.log").read_text() for name in programs]
        assert (files.folder / "runs" / "run" / "adapter").is_dir()
        assert not (files.folder / "~").exists()
        assert list((lent / ".cache" / "edgesplit" / "parts").iterdir())
    finally:
        shutil.rmtree(lent, ignore_errors=True)


def _as_nobody(
    folder: Path, name: str, words: tuple[str, ...], home: dict[str, str]
) -> subprocess.Popen[bytes]:
    left_out = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | home
    script = str(Path(sys.executable).with_name(name))
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*AS_NOBODY, script, *words],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
