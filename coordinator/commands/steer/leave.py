"""`coordinator pause` and `coordinator stop`: end a run that goes on, from another shell."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.results.events.run import StopAsked
from coordinator.results.lifecycle import COMPLETED, PAUSED, read_run
from coordinator.steering.asking import ask
from coordinator.steering.wishes import Kind, Wish
from edge_sdk.errors import EdgeError

PAUSE = "end a run that goes on, so that `resume` goes on just there"
STOP = "end a run that goes on, with the result that it has"


def add_pause(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    _add(commands, "pause", PAUSE)


def add_stop(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    _add(commands, "stop", STOP)


def _add(commands: Any, kind: Kind, text: str) -> None:
    def run(options: argparse.Namespace) -> int:
        return _leave(options, kind)

    parser = add_command(commands, kind, text, run, run_folder=True)
    parser.add_argument(
        "--after-round",
        action="store_true",
        help="not before the round that goes on is done; default: after the step",
    )


def _leave(options: argparse.Namespace, kind: Kind) -> int:
    folder, config = read_run(options.folder, [])
    path, wish = options.folder, Wish(kind, options.after_round)

    def taken() -> None:
        _say(f"run {folder.name}: {StopAsked(kind, wish.after_round, is_urgent=False).text}")

    outcome = ask(path, wish, taken)
    from coordinator.results.standing.standing import stand

    _say(f"run {folder.name}: {stand(folder, config, datetime.now().astimezone()).state}")
    if outcome == PAUSED and kind == "pause":
        _say(f"go on with: coordinator resume {path}")
    elif outcome not in (COMPLETED, "paused", "stopped"):
        raise EdgeError(f"{path}: it ended otherwise: {outcome}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
