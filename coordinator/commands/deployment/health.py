"""`coordinator health`: whether a coordinator is ready for devices, for programs that ask often.

Loads nothing heavy. Exit code 0: it is; 1: it is not, whatever the reason (Docker keeps 2).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say
from coordinator.config.presets import load_serve_config
from coordinator.results.run_folder import CONFIG
from coordinator.results.run_lock import is_held
from coordinator.results.standing.pulse import feel, illness
from edge_sdk.errors import ConfigError

UNWELL_EXIT_CODE = 1
# Seconds within which the event loop turns: it does so twice a second, but not while the machine
# swaps or a file system hangs.
WITHIN_S = 60.0


def add_health(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "whether a coordinator listens and its event loop turns; exit code 0 or 1"
    health = add_command(commands, "health", text, _health)
    health.add_argument("folder", type=Path, metavar="RUN", nargs="?", help="folder of the run")
    health.add_argument(
        "--config", type=Path, help="YAML file that `serve` was given, in place of RUN"
    )
    health.add_argument(
        "--live", action="store_true", help="also well while it comes up, or writes its result"
    )
    health.add_argument(
        "--within",
        type=_seconds,
        default=WITHIN_S,
        metavar="SECONDS",
        help="in which the event loop has turned; default: %(default)g",
    )
    health.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds >= 1):
        raise ValueError(text)
    return seconds


def _health(options: argparse.Namespace) -> int:
    if (options.folder is None) == (options.config is None):
        raise ConfigError("health: give either the folder of a run or --config FILE")
    folder = options.folder or _run_of(options.config, options.overrides)
    if folder is None or not folder.is_dir():
        return _unwell(f"{folder or options.config}: no run yet")
    wrong = illness(feel(folder, time.time()), options.within, is_live_enough=options.live)
    if wrong:
        return _unwell(f"{folder}: {wrong}")
    say(f"{folder}: well")
    return 0


def _unwell(text: str) -> int:
    say(text)  # standard output: what Docker and Kubernetes keep of a probe
    return UNWELL_EXIT_CODE


def _run_of(config: Path, overrides: Sequence[str]) -> Path | None:
    """Return the folder of the run that this config starts; None where there is none yet."""
    told = load_serve_config(config, overrides)
    if told.name is not None:
        return told.runs / told.name
    found = [path.parent for path in told.runs.glob(f"*/{CONFIG}")]
    held = [folder for folder in found if is_held(folder)]
    return max(held or found, key=lambda folder: folder.stat().st_mtime, default=None)
