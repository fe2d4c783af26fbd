"""Programs that are kept: they are heard, signalled, and never outlive whoever wanted them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from coordinator.remote.shell import LocalShell, Program, SshShell, ask, put
from edge_sdk.deadline import Deadline
from edge_sdk.errors import DeviceError

PATIENCE_S = 20.0


def wait_until_gone(pid: int) -> bool:
    """Whether the process has ended in time; a zombie has."""
    deadline = Deadline.after(PATIENCE_S)
    while deadline.left_s():
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def start(code: str, folder: Path, lines: list[str], **settings: dict[str, str]) -> Program:
    """Keep a Python program."""
    command = [sys.executable, "-u", "-c", code]
    return Program(LocalShell(), command, folder=str(folder), on_line=lines.append, **settings)


def wait_for_line(lines: list[str], number: int = 1) -> str:
    """Wait for the program's line of that number."""
    deadline = Deadline.after(PATIENCE_S)
    while len(lines) < number:
        assert deadline.left_s()
        time.sleep(0.01)
    return lines[number - 1]


def test_a_program_is_heard_and_its_end_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines in order, stderr among them; folder, environment and exit code are its own."""
    monkeypatch.setenv("EDGE_SDK_DEVICE", "somebody's own")
    lines: list[str] = []
    code = (
        "import os, sys; print(os.getcwd()); print(os.environ['WORD'], file=sys.stderr)\n"
        "print(os.environ.get('EDGE_SDK_DEVICE')); sys.exit(7)"
    )
    program = start(code, tmp_path, lines, environment={"WORD": "caf\u00e9"})

    assert program.wait(PATIENCE_S)
    program.close()

    assert (program.exit_code, lines) == (7, [str(tmp_path), "caf\u00e9", "None"])


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    """Exit code 127 and a line that says why."""
    lines: list[str] = []
    words = ["/nowhere/program"]
    program = Program(LocalShell(), words, folder=str(tmp_path), on_line=lines.append)

    assert program.wait(PATIENCE_S)
    program.close()

    assert program.exit_code == 127
    assert "cannot start /nowhere/program" in lines[0]


def test_signals_reach_the_program(tmp_path: Path) -> None:
    """A signal that ends it shows in the exit code."""
    lines: list[str] = []
    program = start("import time; print(1); time.sleep(60)", tmp_path, lines)
    wait_for_line(lines)

    program.signal(signal.SIGKILL)

    assert program.wait(PATIENCE_S)
    program.close()
    assert program.exit_code == -signal.SIGKILL


SPAWN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid)
{rest}
"""


@pytest.mark.parametrize("rest", ["time.sleep(600)", "os._exit(3)"])
def test_closing_ends_children_too(tmp_path: Path, rest: str) -> None:
    """Neither a program that ignores SIGTERM is left, nor a child of one that has ended."""
    lines: list[str] = []
    program = start(SPAWN.format(rest=rest), tmp_path, lines)
    pids = [int(word) for word in wait_for_line(lines).split()]

    program.close()

    assert [wait_until_gone(pid) for pid in pids] == [True, True]


OWNER = """
import os, signal, sys, time
from coordinator.remote.shell import LocalShell, Program
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
said = []
program = Program(LocalShell(), [sys.executable, "-c", code], folder="/", on_line=said.append)
while not said:
    time.sleep(0.01)
print(said[0], program._supervisor.pid, flush=True)
os.kill({victim}, signal.SIGKILL)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["os.getpid()", "program._supervisor.pid"])
def test_nothing_outlives_whoever_wanted_it(victim: str) -> None:
    """When the owner is killed, or the supervisor, the program ends all the same."""
    command = [sys.executable, "-c", OWNER.format(victim=victim)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]

    assert [wait_until_gone(pid) for pid in pids] == [True, True]

    owner.kill()
    owner.wait()
    owner.stdout.close()


def test_put_copies_for_the_owner_only(tmp_path: Path) -> None:
    """The same bytes, mode 0600, also over a file that was there with another mode."""
    source, target = tmp_path / "source", tmp_path / "to a place"
    source.write_bytes(os.urandom(300_000))
    target.write_text("old")
    target.chmod(0o644)

    put(LocalShell(), source, str(target))

    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o600


def test_ask_returns_what_a_command_says() -> None:
    """Its stdout; words arrive as they are."""
    assert ask(LocalShell(), ["printf", "%s|", "a b", "$c"]) == "a b|$c|"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sh", "-c", "echo first >&2; echo last >&2; exit 3"], "failed: last"),
        (["sh", "-c", "exit 3"], "failed: exit code 3"),
        (["sleep", "60"], "took more than 0 s"),
        (["there-is-no-such-program"], "there-is-no-such-program is not installed here"),
    ],
)
def test_a_command_that_fails_is_one_clear_line(command: list[str], words: str) -> None:
    """With what it said last."""
    with pytest.raises(DeviceError) as caught:
        ask(LocalShell(), command, timeout_s=0.3)

    assert words in str(caught.value)


def test_a_command_that_is_not_wanted_any_more() -> None:
    """It is ended soon after the event is set, and said to be stopped."""
    stop, began_s = threading.Event(), time.monotonic()
    timer = threading.Timer(0.1, stop.set)
    timer.start()

    with pytest.raises(DeviceError, match="`sleep 60` was stopped"):
        ask(LocalShell(), ["sleep", "60"], stop=stop)

    timer.join()
    assert time.monotonic() - began_s < PATIENCE_S


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")
def test_ssh_asks_nobody_and_quotes() -> None:
    """The command is one word that a POSIX shell takes apart again, behind options for machines."""
    words = SshShell("me@board", ("-p", "2222")).words(["echo", "a b", "$c", "it's"])

    assert words[0] == "ssh"
    assert "BatchMode=yes" in words
    assert words[-5:-1] == ["-p", "2222", "me@board", "--"]
    assert ask(LocalShell(), ["sh", "-c", words[-1]]) == "a b $c it's\n"
