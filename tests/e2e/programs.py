"""Our programs as processes of their own, and the files that they read.

A program starts warm: forked by a process that has imported the heavy libraries once, before any
thread of it was started. It has its own signals, exit code and folder all the same. What only a
cold start shows, the console script and the imports, is a matter of ``Program(..., is_cold=True)``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from edge_sdk.deadline import Deadline

# Far above what any of it takes, also beside others on a busy machine.
PATIENCE_S = 120.0
# What a coordinator and a device import before they say anything.
HEAVY = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "onnx",
    "coordinator.cli",
    "coordinator.rounds.launch",
    "edge_sdk.cli",
    "edge_sdk.client.client",
    "edge_sdk.doctor.examine",
    "edge_sdk.runtime.torch_runtime",
)
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload([*HEAVY])


class Program:
    """One of our programs as a process of its own.

    Args:
        name: A console script, or `python` for a script of which *arguments* begin with the path.
        arguments: The words after it.
        cwd: Its working directory.
        is_cold: Whether a new interpreter executes it, as when a person starts it.
        environment: Variables beside those that are there.
    """

    def __init__(
        self, name: str, *arguments: str, cwd: Path, is_cold: bool = False, **environment: str
    ) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        start = _Cold if is_cold else _Warm
        reader, writer = os.pipe()
        self._process = start([name, *arguments], cwd, settings, writer)
        os.close(writer)
        self.pid = self._process.pid
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reader.start()

    def _read(self, reader: int) -> None:
        with open(reader, encoding="utf-8", errors="replace") as file:
            for line in file:
                self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        """Everything it has said so far."""
        return "\n".join(self.lines)

    def wait_for(self, what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until it has said *what*."""
        self.wait_for_match(re.escape(what), timeout_s)

    def wait_for_match(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait until *pattern* is found in all that it has said; returns where."""
        deadline = Deadline.after(timeout_s)
        while (found := re.search(pattern, self.text)) is None:
            assert deadline.left_s() > 0, f"it never said {pattern!r}: {self.text}"
            assert self._process.wait(0.0) is None, f"it ended without {pattern!r}: {self.text}"
            time.sleep(0.02)
        return found

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._signal(signal.SIGINT)

    def freeze(self) -> None:
        """Let it stand still, as a machine that hangs."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.wait(0.0) is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; returns the exit code, below 0 for a signal."""
        code = self._process.wait(timeout_s)
        if code is None:
            self.kill()
            raise AssertionError(f"still running: {self.text}")
        self._reader.join(5.0)
        return code

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._signal(signal.SIGKILL)
        self._process.wait(PATIENCE_S)


class _Cold:
    """A new interpreter."""

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: dict[str, str], output: int
    ) -> None:
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        self.pid = self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, None if it still runs then."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


class _Warm:
    """A fork of the process that has imported everything."""

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: dict[str, str], output: int
    ) -> None:
        arguments = (list(command), cwd, environment, _Output(output))
        self._process = WARM.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, None if it still runs then."""
        self._process.join(timeout_s)
        return self._process.exitcode


class _Output:
    """A descriptor on its way to another process, where it becomes stdout and stderr."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], None], tuple[Any]]:
        return _take_output, (DupFd(self._descriptor),)


def _take_output(sent: Any) -> None:
    descriptor = sent.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _run(command: list[str], cwd: Path, environment: dict[str, str], _output: None) -> None:
    """Be the program, in a process that was forked for it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    name, *arguments = command
    if name == "python":
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
        return
    sys.argv = command
    [script] = entry_points(group="console_scripts", name=name)
    sys.exit(script.load()())


Start = Callable[..., Program]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    """Write a configuration; JSON is YAML."""
    path.write_text(json.dumps(settings, default=str), encoding="utf-8")
    return path
