"""Supervises one program on a board for somebody who may vanish.

Runs alone, on the board, so it imports nothing of ours.

    python -c SOURCE    then on stdin a line of JSON: what to run; later lines: {"signal": 15}
    on stdout           {"started": pid}, {"line": "what the program says"}, {"exit": code}

When stdin ends, because whoever started it closed it, crashed, or lost the connection, the program
and all its children are ended, and the control groups made for it are removed. The supervisor ends
when stdin has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

# Seconds from the polite signal to the one that kills.
GRACE_S = 5.0
PR_SET_PDEATHSIG = 1

_lock = threading.Lock()


def say(**what: Any) -> None:
    """Write a line, even if nobody is there to read it."""
    with _lock, contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def enter(groups: Sequence[str]) -> None:
    """Make the child end with the supervisor, and enter the groups before it allocates anything."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for group in groups:
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))


def start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the program as the leader of a session of its own."""
    return subprocess.Popen(
        order["command"],
        cwd=order["folder"],
        env={**os.environ, **order["environment"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: enter(order["groups"]),
    )


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Signal the program and its children.

    The number cannot be another program's by now: the leader is not reaped before all are gone.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)


def watch(child: subprocess.Popen[bytes], telling: threading.Thread) -> None:
    """Wait for the end of the program, end what it leaves behind, and say how it ended."""
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    signal_group(child, signal.SIGKILL)
    telling.join()
    say(exit=child.wait())


def tell(child: subprocess.Popen[bytes]) -> None:
    """Pass on what the program says."""
    assert child.stdout is not None
    for line in child.stdout:
        say(line=line.decode("utf-8", "replace").rstrip("\n"))


def end(child: subprocess.Popen[bytes], watching: threading.Thread) -> None:
    """End the program, politely first."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        signal_group(child, number)
    watching.join(GRACE_S)
    signal_group(child, signal.SIGKILL)
    watching.join()


def remove(groups: Sequence[str]) -> None:
    """Remove control groups; the kernel needs a moment for it, or seconds on a busy machine."""
    for group in groups:
        for _ in range(500):
            try:
                os.rmdir(group)
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)


def main() -> None:
    """Do as the first line says until there are no more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    order = json.loads(sys.stdin.readline())
    try:
        child = start(order)
    except (OSError, subprocess.SubprocessError) as error:
        say(line=f"cannot start {order['command'][0]}: {error}")
        say(exit=127)
        return
    say(started=child.pid)
    telling = threading.Thread(target=tell, args=(child,), daemon=True)
    watching = threading.Thread(target=watch, args=(child, telling), daemon=True)
    telling.start()
    watching.start()
    try:
        for line in sys.stdin:
            signal_group(child, json.loads(line)["signal"])
    finally:
        end(child, watching)
        remove(order["groups"])


if __name__ == "__main__":
    main()
