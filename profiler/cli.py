"""`profiler show`: what this device can offer, for people and for programs."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata

from profiler.cores import allowed_cores
from profiler.memory import memory_info, peak_rss, rss
from profiler.readings import Reading


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `profiler` command and return its exit code."""
    options = _parser().parse_args(arguments)
    readings = _readings()
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    if options.format == "json":
        values = {name: reading._asdict() for name, reading in readings.items()}
        print(json.dumps({**values, **facts}, indent=2))
        return 0
    for name, reading in readings.items():
        print(f"{name:<18}{_shown(reading):<16}{reading.source}")
    for name, fact in facts.items():
        print(f"{name:<18}{fact}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="profiler", description="What this device can do.")
    parser.add_argument("-V", "--version", action="version", version=metadata.version("edgesplit"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print memory, cores and versions")
    show.add_argument(
        "--format", choices=("text", "json"), default="text", help="default: %(default)s"
    )
    return parser


def _readings() -> dict[str, Reading]:
    memory = memory_info()
    return {
        "memory_total": memory.total,
        "memory_available": memory.available,
        "process_rss": rss(),
        "process_peak_rss": peak_rss(),
        "cores": allowed_cores(),
    }


def _shown(reading: Reading) -> str:
    if reading.value is None:
        return "unknown"
    if reading.unit == "B":
        return f"{reading.value / 2**20:,.0f} MiB"
    return f"{reading.value:g} {reading.unit}"
