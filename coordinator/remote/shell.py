"""Where commands run: on this machine, or on a board behind ssh; and programs that run there.

A program runs under `supervisor.py`, which ends it when the connection to us ends, whatever the
reason. Knows no run and no plan.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from edge_sdk.deadline import Deadline
from edge_sdk.errors import DeviceError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# Seconds for a short command; installing packages takes longer.
PATIENCE_S = 60.0
# Seconds between looks whether a command is still wanted.
POLL_S = 0.2
# ssh gives a board up that does not answer for 4 x 5 s.
ALIVE_S, ALIVE_COUNT = 5, 4
CONNECT_S = 15
SSH_FAILED = 255


class Shell(Protocol):
    """A place where commands run."""

    python: str
    """A Python interpreter that is there."""

    def words(self, command: Sequence[str]) -> list[str]:
        """Return what to execute here for *command* to run there."""


@dataclass
class LocalShell:
    """This machine."""

    python: str = sys.executable

    def words(self, command: Sequence[str]) -> list[str]:
        """Return the command itself."""
        return list(command)


@dataclass
class SshShell:
    """A board behind ssh, which must let us in without a question."""

    host: str
    """`user@host`, or a name of ssh's own configuration."""
    options: tuple[str, ...] = ()
    """Further options of ssh, such as `-p 2222`."""
    python: str = "python3"

    def words(self, command: Sequence[str]) -> list[str]:
        """Return a call of ssh with the command quoted for a POSIX shell."""
        settings = (
            "BatchMode=yes",
            f"ConnectTimeout={CONNECT_S}",
            f"ServerAliveInterval={ALIVE_S}",
            f"ServerAliveCountMax={ALIVE_COUNT}",
        )
        given = [word for setting in settings for word in ("-o", setting)]
        return ["ssh", "-T", *given, *self.options, self.host, "--", shlex.join(command)]


def ask(
    shell: Shell,
    command: Sequence[str],
    *,
    stdin: IO[bytes] | None = None,
    timeout_s: float = PATIENCE_S,
    stop: threading.Event | None = None,
) -> str:
    """Run a command to its end and return what it wrote to stdout.

    Raises:
        DeviceError: it failed, with the last line that it wrote; or it took too long, or *stop* was
            set before it had ended.
    """
    what = shlex.join(command)
    what = what if len(what) <= 60 else f"{what[:57]}..."
    try:
        running = subprocess.Popen(
            shell.words(command),
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
    except FileNotFoundError as error:
        raise DeviceError(f"{error.filename} is not installed here") from error
    with running:
        try:
            out, said = _to_the_end(running, Deadline.after(timeout_s), stop)
        except subprocess.TimeoutExpired as error:
            is_stopped = stop is not None and stop.is_set()
            how = "was stopped" if is_stopped else f"took more than {timeout_s:.0f} s"
            raise DeviceError(f"`{what}` {how}") from error
        finally:
            running.kill()  # does nothing to one that has ended
    if running.returncode:
        lines = (said or out).decode("utf-8", "replace").strip().splitlines()
        how = "cannot be reached" if running.returncode == SSH_FAILED else f"`{what}` failed"
        raise DeviceError(f"{how}: {lines[-1] if lines else f'exit code {running.returncode}'}")
    return out.decode("utf-8", "replace")


def _to_the_end(
    running: subprocess.Popen[bytes], deadline: Deadline, stop: threading.Event | None
) -> tuple[bytes, bytes]:
    while True:
        left_s = deadline.left_s()
        try:
            return running.communicate(timeout=left_s if stop is None else min(left_s, POLL_S))
        except subprocess.TimeoutExpired:  # what it has written until now is not lost
            if not deadline.left_s() or (stop is not None and stop.is_set()):
                raise


def put(shell: Shell, source: Path, target: str, *, stop: threading.Event | None = None) -> None:
    """Copy a file there, readable by its owner only; the folder must exist."""
    words = ["sh", "-c", 'umask 077 && rm -f "$1" && cat > "$1"', "sh", target]
    with source.open("rb") as file:
        ask(shell, words, stdin=file, timeout_s=60 * PATIENCE_S, stop=stop)


class Program:
    """A program that runs somewhere, under a supervisor.

    Args:
        shell: Where it runs.
        command: Its words.
        folder: Its working directory.
        environment: Variables in addition to those that are there.
        groups: Control groups to enter; they are removed with the program.
        on_line: Gets each line that it writes; called from a thread of ours.
    """

    def __init__(
        self,
        shell: Shell,
        command: Sequence[str],
        *,
        folder: str,
        environment: Mapping[str, str] | None = None,
        groups: Sequence[Path] = (),
        on_line: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._on_line = on_line
        self.pid: int | None = None
        """Its process id there, once it runs."""
        self.exit_code: int | None = None
        """How it ended, below 0 by a signal; None while it runs, and where it is unknown."""
        self._over = threading.Event()
        # Without the variables of our own shell that configure a device.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EDGE_SDK_")}
        self._supervisor = subprocess.Popen(
            shell.words([shell.python, "-u", "-c", SUPERVISOR.read_text(encoding="utf-8")]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=inherited,
            start_new_session=True,  # Ctrl-C is for us, and we decide what it means for boards
        )
        self._order(
            command=list(command),
            folder=folder,
            environment=dict(environment or {}),
            groups=[str(group) for group in groups],
        )
        self._reader = threading.Thread(target=self._read, name="edgesplit-program", daemon=True)
        self._reader.start()

    def _order(self, **what: object) -> None:
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is over: the reader finds out
            self._supervisor.stdin.write(json.dumps(what).encode() + b"\n")
            self._supervisor.stdin.flush()

    def _read(self) -> None:
        assert self._supervisor.stdout is not None
        for raw in self._supervisor.stdout:
            try:
                said = json.loads(raw)
                key, value = next(iter(said.items()))
            except (ValueError, AttributeError, StopIteration):  # a message of ssh's own
                key, value = "line", raw.decode("utf-8", "replace").rstrip("\r\n")
            if key == "line":
                self._on_line(value)
            elif key == "started":
                self.pid = value
            elif key == "exit":
                self.exit_code = value
                break
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether it has ended or is out of reach."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; return whether it has come."""
        return self._over.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to its children."""
        self._order(signal=int(number))

    def close(self) -> None:
        """End it if it has not ended, and wait until nothing of it is left."""
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:  # the board is out of reach; it will find out by itself
            self._supervisor.kill()
            self._supervisor.wait()
        self._over.wait(PATIENCE_S)
        self._reader.join()
        self._supervisor.stdout.close()
