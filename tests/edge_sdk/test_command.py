"""Ctrl-C: a program that was asked to stop leaves, whatever it does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import INTERRUPTED_EXIT_CODE, StorageError

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


LOGGING = """
import argparse, logging, sys
from edge_sdk.command import add_log_level, run_command
def run(_):
    logging.getLogger("edge_sdk.test").info("thing.happened kind=%s", "good")
    logging.getLogger("edge_sdk.test").warning("thing.failed kind=%s", "bad")
    return 0
parser = argparse.ArgumentParser(prog="tool")
add_log_level(parser)
parser.set_defaults(run=run)
sys.exit(run_command(parser, sys.argv[1:]))
"""


def logged(*arguments: str) -> tuple[int, str]:
    """Run a program with two records of its own; return its exit code and what it showed."""
    ended = subprocess.run(
        [sys.executable, "-c", LOGGING, *arguments], capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_log_file_holds_at_least_the_level_info(level: str, tmp_path: Path) -> None:
    """It is added to, is its owner's alone where it is new, and changes nothing on the terminal."""
    file = tmp_path / "run.log"

    for _ in range(2):
        code, shown = logged("--log-level", level, "--log-file", str(file))

        assert code == 0
        assert ("thing.happened kind=good" in shown) == (level in ("debug", "info"))
        assert ("thing.failed kind=bad" in shown) == (level != "error")

    texts = [line.partition(" edge_sdk.test ")[2] for line in file.read_text("utf-8").splitlines()]
    assert [text for text in texts if text] == 2 * [
        "thing.happened kind=good",
        "thing.failed kind=bad",
    ]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The program ends with one line and the code of a file that cannot be written."""
    code, shown = logged("--log-file", str(tmp_path / "absent" / "run.log"))

    assert code == StorageError.exit_code
    assert shown.startswith("tool: cannot write --log-file ")
    assert len(shown.splitlines()) == 1
