"""`coordinator presets`: published methods as configurations."""

from __future__ import annotations

import argparse
import json
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.config.presets import NAMES, preset_text, preset_title


def add_presets(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = commands.add_parser("presets", help="published methods as configurations")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_command(verbs, "list", "list the presets", _list_presets, formats=True)
    show = add_command(verbs, "show", "print a preset", _show_preset)
    show.add_argument("name")


def _list_presets(options: argparse.Namespace) -> int:
    titles = {name: preset_title(name) for name in NAMES}
    if options.format == "json":
        print(json.dumps(titles, indent=2))
        return 0
    for name, title in titles.items():
        print(f"{name:<12} {title}")
    return 0


def _show_preset(options: argparse.Namespace) -> int:
    print(preset_text(options.name), end="")
    return 0
