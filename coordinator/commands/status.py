"""`coordinator status`: where a run stands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.results.events import nth
from coordinator.results.history import RunHistory
from coordinator.results.json_text import json_text
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import RunFolder


def add_status(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    add_command(commands, "status", "where a run stands", _status, run_folder=True, formats=True)


def _status(options: argparse.Namespace) -> int:
    from rich.console import Console as RichConsole

    from coordinator.results.console import summary

    folder = RunFolder.open(options.folder)
    config = read_config(options.folder)
    history = RunHistory(folder)
    last = history.events[-1] if history.events else None
    waiting, missing, tours = history.waiting(), history.missing(), history.tours()
    damaged = {damage.checkpoint.name: damage.reason for damage in folder.damages()}
    facts = {
        "run": folder.name,
        "rounds": config.rounds,
        "rounds_done": history.rounds_done,
        "last_event": last,
        "waiting": waiting,
        "missing": missing,
        "tours": tours,
        "checkpoints": [p.name for p in folder.checkpoints() if p.name not in damaged],
        "damaged": damaged,
        "metrics": history.metrics[-1] if history.metrics else None,
    }
    if options.format == "json":
        print(json.dumps(json.loads(json_text(facts)), indent=2))
        return 0
    print(f"run {folder.name}: {history.rounds_done} of {config.rounds} rounds", end="")
    print(f"; {last['event']} at {last['time']}" if last else "")
    for line in _standing(tours):
        print(line)
    for device, wait in waiting.items():
        print(f"waiting for {device} since {wait['since']}: {wait['what']}")
    if missing is not None:
        here, least = len(missing["ready"]), missing["least"]
        print(f"round {nth(missing['round'])} has {here} of the {least} devices that it needs")
        for device, why in missing["why"].items():
            print(f"{device} {why} (at {missing['time']})")
    if history.metrics and (lags := history.metrics[-1].get("lag_by_device")):
        shares = ", ".join(f"{device} {lag:.1%}" for device, lag in lags.items())
        print(f"devices lack of what the run has learned: {shares}")
    for name, reason in damaged.items():
        print(f"{name} is damaged: {reason}")
    RichConsole(highlight=False).print(summary(history))
    return 0


def _standing(tours: Mapping[str, Any] | None) -> list[str]:
    """Say where each device stood at the last merge, where nobody waits for anybody."""
    if tours is None:
        return []
    newest = tours["version"]
    return [
        f"{device} trains with version {on['version']} of {newest}, {on['staleness']} merges behind"
        for device, on in tours["on_tour"].items()
    ]
