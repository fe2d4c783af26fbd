"""Start processes, wait for them, and stop every one of them whatever happens. Knows no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ("EDGE_SDK_", "COORDINATOR_")
# Devices have heard that the run is over when the coordinator leaves; they need not wait long.
FAREWELL_S = 60.0
STOP_S = 20.0
TAIL_LINES = 20


class Failed(Exception):
    """A process of the demo failed; the message says which and shows the end of its log."""


class Signals:
    """Ctrl-C and SIGTERM: raised once, and never where a process could be lost by it."""

    def __init__(self) -> None:
        self.count = 0
        self._is_held = False

    def install(self) -> None:
        """From here on, listen."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1 and not self._is_held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only count them."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False


SIGNALS = Signals()


class Processes:
    """The processes of one run. Use as a context manager: it leaves none behind."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path | None]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, command: list[str], cwd: Path, log: Path | None, threads: int = 1
    ) -> None:
        """Start one of our commands; without *log* it writes to our own stderr."""
        command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        # A session of its own: Ctrl-C reaches us alone, and we say once to each that it must stop.
        with SIGNALS.held(), open(log or os.devnull, "ab") as file:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=file if log else sys.stderr,
                stderr=file if log else sys.stderr,
                start_new_session=True,
            )
            self._running[name] = (process, log)
        if SIGNALS.count:
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Wait until all have ended well.

        Raises:
            Failed: one has not.
        """
        deadline_s = float("inf")
        while self._running:
            for name, (process, log) in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[name]
                if code:
                    raise Failed(f"{name} ended with exit code {code}{end_of(log)}")
                deadline_s = min(deadline_s, time.monotonic() + FAREWELL_S)
            if time.monotonic() > deadline_s:
                raise Failed(f"{', '.join(self._running)} did not end with the run")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask all that still run to leave, the first one first; end those that do not."""
        with SIGNALS.held():
            asked = SIGNALS.count
            for process, _ in self._running.values():
                # The coordinator first: devices save their state before it goes, it a checkpoint.
                process.terminate()
                deadline_s = time.monotonic() + STOP_S
                # One more Ctrl-C: at once.
                while process.poll() is None and SIGNALS.count == asked:
                    if time.monotonic() > deadline_s:
                        break
                    time.sleep(0.05)
            for process, _ in self._running.values():
                process.kill()
                process.wait()
            self._running.clear()


def environment(threads: int = 1) -> dict[str, str]:
    """Our environment without settings of somebody's own runs; few threads, and no warnings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    env |= {"PYTHONWARNINGS": "ignore::FutureWarning", "TRANSFORMERS_VERBOSITY": "error"}
    return env


def end_of(log: Path | None) -> str:
    """The last lines of *log*, to be put behind a message."""
    if log is None:
        return "; its lines are above"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return f"; the end of {log}:\n" + "\n".join(f"    {line}" for line in lines)


def call(script: str, log: Path, *arguments: str) -> dict[str, Any]:
    """Run a script beside this one and return the JSON of its last line.

    Raises:
        Failed: it ended with an error.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, env=environment(), start_new_session=True
        )
        try:
            out, _ = process.communicate()
        finally:
            with suppress(ProcessLookupError):  # it has ended, as it should
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.wait()
    if process.returncode:
        raise Failed(f"{script} ended with exit code {process.returncode}{end_of(log)}")
    found: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return found
