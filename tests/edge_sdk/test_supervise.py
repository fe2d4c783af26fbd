"""A supervised command is started again when that may help, and never outlives its supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.supervise import MOST_DEATHS, MOST_KILLED, NOT_RESTARTED, WINDOW_S, Restarts
from tests.memory_group import memory_group

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
SUPERVISE = (
    "import sys; from edge_sdk.supervise import Supervisor\n"
    "say = lambda line: print(line, flush=True)\n"
    "sys.exit(Supervisor([sys.executable, *sys.argv[1:]], say).run())"
)
WAIT = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(130))
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
while True: time.sleep(0.05)
"""


class Supervised:
    """A Python program under a supervisor, in processes of their own."""

    def __init__(self, folder: Path, code: str, *, prefix: Callable[..., list[str]] = list) -> None:
        self.pids, script = folder / "pids", folder / "child.py"
        script.write_text(code)
        command = [sys.executable, "-c", SUPERVISE, str(script), str(self.pids)]
        self._process = subprocess.Popen(
            prefix(command), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        self.pid = self._process.pid

    def child(self, number: int) -> int:
        """Return the process id of the child that was started as *number*, from 0."""
        wait_until(lambda: self.pids.exists() and self.pids.read_text().count("\n") > number)
        return int(self.pids.read_text().split()[number])

    def hear(self, line: str) -> None:
        """Wait until it says *line*."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{line}\n"

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end; return the exit code and what it said."""
        said, _ = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, said.splitlines()

    def close(self) -> None:
        """End what is left of it."""
        self._process.kill()
        self._process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def made() -> Iterator[list[Supervised]]:
    """Supervisors that are ended with the test."""
    found: list[Supervised] = []
    yield found
    for one in found:
        one.close()


# ---- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "again"),
    [
        *((code, False) for code in (0, 2, 4, 7, 8, 130)),
        *((code, True) for code in (1, 3, 5, 6, 9, 10)),
        *((-number, True) for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)),
        (-signal.SIGABRT, True),
        *((-number, False) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_what_may_pass_is_tried_again(code: int, again: bool) -> None:
    """As the systemd unit does it: a person's matters and a stop are not retried."""
    assert (Restarts().pause_s(code, 0.0, for_memory=False) is not None) == again


def test_the_unit_and_the_supervisor_agree() -> None:
    """What systemd does not start again is what the supervisor does not start again."""
    unit = (ROOT / "examples" / "jetson" / "edgesplit-device.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)

    prevented = {int(code) for code in settings["RestartPreventExitStatus"].split()}
    assert {0, int(settings["SuccessExitStatus"]), *prevented} == NOT_RESTARTED


def test_a_program_that_dies_at_once_stays_down() -> None:
    """Pauses grow, and end with the last try; what died long ago does not count."""
    restarts, now_s = Restarts(), 0.0
    pauses = []
    for _ in range(MOST_DEATHS):
        pauses.append(restarts.pause_s(1, now_s, for_memory=False))
        now_s += 1.0

    assert pauses == [1.0, 2.0, 4.0, 8.0, None]
    assert restarts.pause_s(1, now_s + WINDOW_S, for_memory=False) == 1.0


def test_want_of_memory_is_tried_more_often() -> None:
    """Each time the plan is smaller; but not for ever."""
    restarts = Restarts()
    pauses = [restarts.pause_s(-9, float(n), for_memory=True) for n in range(MOST_KILLED)]

    assert pauses == [1.0] * (MOST_KILLED - 1) + [None]


# ---- processes -----------------------------------------------------------------------------------


def test_a_killed_child_is_started_again_and_a_stop_is_handed_on(
    tmp_path: Path, made: list[Supervised]
) -> None:
    """SIGKILL brings another child; SIGTERM ends both, with the child's code."""
    made.append(one := Supervised(tmp_path, WAIT))
    first = one.child(0)
    os.kill(first, signal.SIGKILL)
    second = one.child(1)
    os.kill(one.pid, signal.SIGTERM)

    code, said = one.end()

    assert (code, said) == (130, ["killed by SIGKILL; starting again in 1 s"])
    assert not is_alive(second)


def test_no_child_outlives_its_supervisor(tmp_path: Path, made: list[Supervised]) -> None:
    """Not even one whose supervisor was killed."""
    made.append(one := Supervised(tmp_path, WAIT))
    child = one.child(0)

    os.kill(one.pid, signal.SIGKILL)

    wait_until(lambda: not is_alive(child))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_between_two_starts_counts(
    tmp_path: Path, made: list[Supervised], number: signal.Signals
) -> None:
    """Who asks while it waits for the next start ends it; so does who asks a little later."""
    fails_first = "import os, sys\nos.path.exists(sys.argv[1]) or (open(sys.argv[1], 'a'), 1 / 0)\n"
    made.append(one := Supervised(tmp_path, fails_first + WAIT))
    one.hear("ended with 1; starting again in 1 s")

    os.kill(one.pid, number)

    assert one.end()[0] == 130


def test_the_exit_code_of_the_last_child_is_passed_on(
    tmp_path: Path, made: list[Supervised]
) -> None:
    """A refusal stays a refusal, in one line."""
    made.append(one := Supervised(tmp_path, "raise SystemExit(4)"))

    assert one.end() == (4, [])


def test_a_child_that_the_kernel_killed_for_memory_is_named_so(
    tmp_path: Path, made: list[Supervised]
) -> None:
    """In a real control group: the supervisor lives, the child is killed, another one is begun."""
    eat = (
        "import pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "is_first = not file.exists()\n"
        "file.open('a').write('1\\n')\n"
        "held = [bytearray(b'x' * 2**20) for _ in range(400)] if is_first else []\n"
    )
    with memory_group() as group:
        group.limit(200 * 2**20)
        made.append(one := Supervised(tmp_path, eat, prefix=group.command))

        code, said = one.end()

    assert said == ["killed by the kernel: out of memory; starting again in 1 s"]
    assert (code, one.pids.read_text()) == (0, "1\n1\n")
