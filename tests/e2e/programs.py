"""Our console scripts as processes of their own, and the files that they read."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from edge_sdk.deadline import Deadline

PATIENCE_S = 60.0


class Program:
    """One of our console scripts as a process of its own."""

    def __init__(self, name: str, *arguments: str, cwd: Path, **environment: str) -> None:
        command = [str(Path(sys.executable).parent / name), *arguments]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=settings,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        """Everything it has said so far."""
        return "\n".join(self.lines)

    def wait_for(self, what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until it has said *what*."""
        deadline = Deadline.after(timeout_s)
        while what not in self.text:
            assert deadline.left_s() > 0, f"it never said {what!r}: {self.text}"
            assert self._process.poll() is None, f"it ended without {what!r}: {self.text}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def freeze(self) -> None:
        """Let it stand still, as a machine that hangs."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; returns the exit code."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running: {self.text}") from None
        self._reader.join(5.0)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


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
