"""`coordinator init`: a commented configuration of a run to begin with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.config import run
from coordinator.config.presets import load_serve_config
from edge_sdk.config.templates import filled, write_config

TEMPLATE = Path(run.__file__).with_name("run.yaml")
EXAMPLE = "examples/coordinator.yaml"
"""What the template calls the file that it becomes."""


def add_init(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    init = add_command(commands, "init", "write a commented config to begin with", _init)
    init.add_argument(
        "path", nargs="?", type=Path, default=Path("run.yaml"), help="default: %(default)s"
    )
    init.add_argument("--model", metavar="FOLDER", help="folder or hub id of the model")
    init.add_argument("--listen", metavar="ADDRESS", help="default: tcp://*:7070")


def _init(options: argparse.Namespace) -> int:
    given = {"model": options.model, "listen": options.listen}
    # What is wrong with a value is better known before there is a file.
    load_serve_config(TEMPLATE, [f"{key}={value}" for key, value in given.items() if value], {})
    text = filled(TEMPLATE.read_text(encoding="utf-8"), given).replace(EXAMPLE, str(options.path))
    write_config(options.path, text)
    print(f"{options.path} written; change it, then: coordinator check --config {options.path}")
    return 0
