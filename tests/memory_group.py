"""Control groups with a memory limit, where this machine lets us make them."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from profiler.sensors.cgroup import groups

LIMITS = ("memory.max", "memory.limit_in_bytes")
NO_SWAP = {"memory.swap.max": "0", "memory.memsw.limit_in_bytes": "", "memory.swappiness": "0"}


class MemoryGroup:
    """A control group; what is started in it is killed by the kernel when it takes too much."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def limit(self, num_bytes: int) -> None:
        """Let all processes in it have so much memory together."""
        name = next(name for name in LIMITS if (self._folder / name).exists())
        (self._folder / name).write_text(str(num_bytes))
        for other, value in NO_SWAP.items():
            with suppress(OSError):  # without swap there is nothing to forbid
                if (self._folder / other).exists():
                    (self._folder / other).write_text(value or str(num_bytes))

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs *words* in it."""
        enter = f"echo $$ > {shlex.quote(str(self._folder / 'cgroup.procs'))}"
        return ["sh", "-c", f'{enter} && exec "$@"', "sh", *words]

    def close(self) -> None:
        """End what is in it, and remove it."""
        until_s = time.monotonic() + 30.0
        while time.monotonic() < until_s:
            for pid in (self._folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.05)


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Make a control group for memory, or skip the test and say why it cannot be made."""
    above = next(iter(groups("memory", Path("/"))), None)
    if above is None:
        pytest.skip("no control group for memory is mounted here")
    folder = above / f"edgesplit-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {above}: {error.strerror}")
    group = MemoryGroup(folder)
    try:
        if not any((folder / name).exists() for name in LIMITS):
            pytest.skip(f"groups in {above} have no memory limit")
        yield group
    finally:
        group.close()
