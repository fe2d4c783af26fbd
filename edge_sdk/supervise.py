"""Run a command as a child, and start it again when it has died of something that may pass.

What `edge-sdk run --supervise` does where no systemd looks after a device. Knows no run: which
deaths were for want of memory, and what follows from it, the new child finds out by itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType

from edge_sdk.errors import INTERRUPTED_EXIT_CODE
from profiler.sensors.memory import oom_kills

# What a person must mend: configuration, refusal, data, model. As in the systemd unit.
NOT_RESTARTED = frozenset({0, INTERRUPTED_EXIT_CODE, 2, 4, 7, 8})
# Somebody asked for the end in these words.
_ORDERLY = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE})
# So many deaths within so many seconds, and it stays down.
MOST_DEATHS, WINDOW_S = 5, 900.0
# Want of memory is answered with a smaller plan each time; more are not made.
MOST_KILLED = 20
LONGEST_PAUSE_S = 20.0
SIGNAL_EXIT = 128
_PR_SET_PDEATHSIG = 1


class Restarts:
    """Decides whether a dead child is started again, and when. Pure: it is told the time."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._killed: deque[float] = deque()

    def pause_s(self, code: int, now_s: float, *, for_memory: bool) -> float | None:
        """Return the seconds to wait before the next start; None where there is none.

        Args:
            code: The child's exit code, below 0 for a signal.
            now_s: The time of its death, in seconds on any clock.
            for_memory: Whether the kernel killed it because memory was short.
        """
        if code in NOT_RESTARTED or -code in _ORDERLY:
            return None
        recent, most = (self._killed, MOST_KILLED) if for_memory else (self._deaths, MOST_DEATHS)
        recent.append(now_s)
        while recent[0] <= now_s - WINDOW_S:
            recent.popleft()
        if len(recent) >= most:
            return None
        return 1.0 if for_memory else min(LONGEST_PAUSE_S, 2.0 ** (len(recent) - 1))


class Supervisor:
    """One command, as long as it is worth it.

    Args:
        command: Program and arguments.
        say: Takes a line for the person who reads the output.
    """

    def __init__(self, command: Sequence[str], say: Callable[[str], None]) -> None:
        self._command, self._say = list(command), say
        self._restarts = Restarts()
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = 0
        self._stop = threading.Event()

    def run(self) -> int:
        """Run the command until it is over; return the exit code of its last run.

        SIGINT and SIGTERM are handed on; the third of them kills. The child never outlives this
        process. Call it in the main thread: others hear no signals.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._hand_on) for number in numbers}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
                self._child.wait()

    def _run(self) -> int:
        while True:
            before = oom_kills()
            code = self._run_once()
            for_memory = code == -signal.SIGKILL and oom_kills().rose_since(before)
            pause_s = self._restarts.pause_s(code, time.monotonic(), for_memory=for_memory)
            how = _how(code, for_memory=for_memory)
            if self._asked or pause_s is None:
                if code not in NOT_RESTARTED and not self._asked:
                    self._say(f"{how}; not started again")
                return SIGNAL_EXIT - code if code < 0 else code
            self._say(f"{how}; starting again in {pause_s:.0f} s")
            if self._stop.wait(pause_s):
                return INTERRUPTED_EXIT_CODE

    def _run_once(self) -> int:
        # In a session of its own, so that Ctrl-C reaches it once: through this process.
        child = subprocess.Popen(
            self._command,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )
        self._child = child
        if self._asked:  # while it was being started
            child.send_signal(signal.SIGTERM)
        return child.wait()

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        self._stop.set()
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL if self._asked > 2 else number)


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a child does before it becomes the command: ask to die with its parent."""
    libc = ctypes.CDLL(None)  # loaded before the fork: little is safe after it

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died in between
            os._exit(INTERRUPTED_EXIT_CODE)

    return ask


def _how(code: int, *, for_memory: bool) -> str:
    if for_memory:
        return "killed by the kernel: out of memory"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
