"""How a command of `coordinator` is registered."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from edge_sdk.arguments import all_commands, complete_settings

SERVE_CONFIG = ("coordinator.config.run", "ServeConfig", "")
CONFIGS = {
    "simulate": ("coordinator.lab.simulation.config", "SimulationConfig", ""),
    "compare": ("coordinator.lab.comparison.config", "CompareConfig", ""),
    "deploy": ("coordinator.fleet.config", "DeployConfig", ""),
    "experiment run": ("coordinator.lab.experiment.config", "ExperimentConfig", ""),
    "audit-privacy": ("coordinator.lab.privacy.config", "AuditConfig", "data."),
}
"""What the settings of a command are, where not a run's: module, class, and the key above all."""
_METHODS = ("preset", "presets")


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


def complete_words(parser: argparse.ArgumentParser) -> None:
    """Let a shell complete settings and methods of all commands."""
    for name, command in all_commands(parser):
        module, kind, within = CONFIGS.get(name, SERVE_CONFIG)
        complete_settings(command, partial(_load, module, kind), within)
        for action in command._actions:  # noqa: SLF001
            if (name, action.dest) == ("presets show", "name") or action.dest in _METHODS:
                action.completer = _presets  # type: ignore[attr-defined]


def _load(module: str, kind: str) -> type:
    found: type = getattr(import_module(module), kind)
    return found


def _presets(**_: object) -> list[str]:
    from coordinator.config.presets import NAMES

    return list(NAMES)
