"""`coordinator deploy boards.yaml`: devices on boards behind ssh, brought, started, looked at."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say
from edge_sdk.command import stopping_on_signals
from edge_sdk.config.loader import load_config
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, DeviceError


def add_deploy(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "bring devices to boards behind ssh, and start them there"
    parser = add_command(commands, "deploy", text, _deploy)
    parser.description = (
        "Brings EdgeSplit, a key, config, data and a service to each board of a file, asks the "
        "doctor there and starts it; a line a board. What is there already is left alone. ssh must "
        "get in without a question."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML file; docs/deployment.md")
    what = parser.add_mutually_exclusive_group()
    for name, meaning in {
        "check": "change nothing; say what would be done",
        "status": "what runs there, and what it said last",
        "stop": "let devices finish their step and end",
        "remove": "stop, and remove everything of the device from its board",
    }.items():
        what.add_argument(f"--{name}", dest="do", action="store_const", const=name, help=meaning)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these boards alone")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file")


def _note(text: str) -> None:
    """Say what takes a while, where it is no result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _deploy(options: argparse.Namespace) -> int:
    from coordinator.fleet.config import DeployConfig
    from coordinator.fleet.deploy import Deployment

    config = load_config(DeployConfig, options.file, options.overrides, env={})
    stop = threading.Event()
    with stopping_on_signals(stop.set):
        failed = Deployment(config, say, stop, _note).run(options.do or "deploy", options.only)
    if stop.is_set():
        return INTERRUPTED_EXIT_CODE
    return DeviceError.exit_code if failed else 0
