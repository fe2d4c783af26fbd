"""How a command of `coordinator` is registered."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_command(
    commands: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    *,
    run_folder: bool = False,
    formats: bool = False,
) -> argparse.ArgumentParser:
    """Register a command; *run* gets its options and returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    if run_folder:
        parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    if formats:
        parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser
