"""Ctrl-C: a program that was asked to stop leaves, whatever it does."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from edge_sdk.errors import INTERRUPTED_EXIT_CODE

PROGRAM = """
import threading
from edge_sdk.command import stopping_on_signals
asked = threading.Event()
with stopping_on_signals(asked.set, {within_s}):
    print("begun", flush=True)
    asked.wait()
    {then}
print("ended", flush=True)
"""


def run(within_s: float | None, then: str) -> tuple[int, str]:
    """Start a program, send it one Ctrl-C, and return how it ended and what it said."""
    text = PROGRAM.format(within_s=within_s, then=then)
    with subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "begun\n"
        program.send_signal(signal.SIGINT)
        said = program.stdout.read()
        return program.wait(60), said


def test_what_takes_too_long_after_a_stop_is_left() -> None:
    """It ends with 130, and says so."""
    code, said = run(0.1, "threading.Event().wait()")

    assert code == INTERRUPTED_EXIT_CODE
    assert said == "stopped in the middle of what was being done\n"


@pytest.mark.parametrize("within_s", [None, 600.0])
def test_what_ends_in_time_goes_on_as_it_wants(within_s: float | None) -> None:
    """The clock stops with what was to be stopped."""
    assert run(within_s, "pass") == (0, "ended\n")
