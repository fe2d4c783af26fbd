"""`coordinator status`: which runs there are, or where one of them stands."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.results.events.event import nth, some_names
from coordinator.results.history import RunHistory
from coordinator.results.json_text import json_text
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.errors import ConfigError, EdgeError, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coordinator.results.standing.standing import Standing

# Seconds between two looks of `--watch`.
WATCH_S = 2.0
# Devices of which it is said what they lack.
MOST_LAGS = 40


def add_status(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    status = add_command(commands, "status", "which runs there are, or where one stands", _status)
    status.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        nargs="?",
        help="folder of a run, or of several; default: the runs below --runs",
    )
    status.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of runs; default: %(default)s"
    )
    status.add_argument(
        "--all", action="store_true", help="show every device of a run, however many there are"
    )
    status.add_argument("--format", choices=("text", "json"), default="text")
    status.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=WATCH_S,
        metavar="SECONDS",
        help=f"show it anew every so many seconds, default {WATCH_S:g}, until the run is complete",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds >= 0.1):
        raise ValueError(text)
    return seconds


def _status(options: argparse.Namespace) -> int:
    folder = options.folder
    if folder is not None and ((folder / CONFIG).is_file() or not _holds_runs(folder)):
        view: _OneRun | _Runs = _OneRun(RunFolder.open(folder), shows_all=options.all)
    else:
        view = _Runs(folder or options.runs)
    if options.format == "json":
        if options.watch is not None:
            raise ConfigError("--watch: shows text; leave --format json away")
        print(json.dumps(json.loads(json_text(view.facts())), indent=2))
        return 0
    from rich.console import Console as RichConsole

    console = RichConsole(highlight=False, markup=False)
    if options.watch is None:
        console.print(view.shown(), soft_wrap=False)
        return 0
    _watch(view, console, options.watch)
    return 0


def _watch(view: _OneRun | _Runs, console: Any, every_s: float) -> None:
    """Show *view* again and again, in place where there is a terminal, until nothing more comes."""
    from rich.live import Live

    if not sys.stdout.isatty():
        while True:
            is_over = view.is_over()  # before the look, which then shows how it ended
            console.print(view.shown())
            if is_over:
                return
            print(flush=True)
            time.sleep(every_s)
    with Live(view.shown(), console=console, auto_refresh=False) as live:
        is_over = view.is_over()
        while not is_over:
            time.sleep(every_s)
            is_over = view.is_over()
            live.update(view.shown(), refresh=True)


def _holds_runs(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(f"*/{CONFIG}"))


def _now() -> datetime:
    return datetime.now().astimezone()


class _Runs:
    """All runs below a folder, the newest last."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder of runs; name a run, or its folder with --runs"
            )
        self._folder = folder

    def _found(self) -> list[Standing]:
        from coordinator.results.standing.standing import stand

        found = []
        for path in sorted(self._folder.glob(f"*/{CONFIG}"), key=_made):
            try:
                found.append(stand(RunFolder(path.parent), read_config(path.parent), _now()))
            except EdgeError as error:  # one that cannot be read hides no other
                print(f"{path.parent.name}: {one_line(error)}", file=sys.stderr)
        return found

    def facts(self) -> dict[str, Any]:
        """Return the runs for a program."""
        return {"runs": [asdict(one) for one in self._found()]}

    def shown(self) -> RenderableType:
        """Return the runs for a person."""
        from coordinator.results.standing.words import run_table

        found = self._found()
        return run_table(found) if found else f"no runs in {self._folder}"

    def is_over(self) -> bool:
        """Return whether none of them goes on."""
        return not any(one.is_running for one in self._found())


def _made(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class _OneRun:
    """One run, in all that is known of it."""

    def __init__(self, folder: RunFolder, *, shows_all: bool = False) -> None:
        self._folder, self._config = folder, read_config(folder.path)
        self._shows_all = shows_all
        self._checked: tuple[list[str], dict[str, str]] | None = None

    def _standing(self) -> Standing:
        from coordinator.results.standing.standing import stand

        return stand(self._folder, self._config, _now())

    def _damaged(self) -> dict[str, str]:
        """Return what is wrong with checkpoints; they are read again where others have come."""
        names = [path.name for path in self._folder.checkpoints()]
        if self._checked is None or self._checked[0] != names:
            found = {d.checkpoint.name: d.reason for d in self._folder.damages()}
            self._checked = names, found
        return self._checked[1]

    def facts(self) -> dict[str, Any]:
        """Return the run for a program."""
        history, damaged = RunHistory(self._folder), self._damaged()
        return {
            **asdict(self._standing()),
            "rounds_done": history.rounds_done,
            "last_event": history.events[-1] if history.events else None,
            "waiting": history.waiting(),
            "missing": history.missing(),
            "tours": history.tours(),
            "checkpoints": [p.name for p in self._folder.checkpoints() if p.name not in damaged],
            "damaged": damaged,
            "metrics": history.metrics[-1] if history.metrics else None,
            "test": history.test(),
        }

    def is_over(self) -> bool:
        """Return whether nobody holds the run."""
        return not self._standing().is_running

    def shown(self) -> RenderableType:
        """Return the run for a person."""
        from rich.console import Group

        from coordinator.results.console import summary
        from coordinator.results.standing.words import (
            MOST_DEVICES,
            MOST_LINES,
            device_lines,
            device_table,
            fleet_line,
            head,
            shortened,
            test_line,
        )

        found, history = self._standing(), RunHistory(self._folder)
        most_lines = None if self._shows_all else MOST_LINES
        most_devices = None if self._shows_all else MOST_DEVICES
        parts: list[RenderableType] = [*head(found)]
        parts += [line for line in (fleet_line(found.devices),) if line]
        parts += shortened(self._waits(history), most_lines)
        if found.devices:
            parts += ["", device_table(found.devices[:most_devices])]
            if most_devices is not None and (more := len(found.devices) - most_devices) > 0:
                parts.append(f"and {more:,} more devices; --all shows them")
            parts += shortened(device_lines(found.devices), most_lines)
        parts += [f"{name} is damaged: {reason}" for name, reason in self._damaged().items()]
        if history.first_scores():
            parts.append(summary(history, most_devices))
        if (test := history.test()) is not None:
            parts.append(test_line(test))
        return Group(*parts)

    def _waits(self, history: RunHistory) -> list[str]:
        """Say whom the run waits for, and how far devices are behind."""
        lines = _standing(history.tours())
        for device, wait in history.waiting().items():
            lines.append(f"waiting for {device} since {wait['since']}: {wait['what']}")
        if (missing := history.missing()) is not None:
            here, least = len(missing["ready"]), missing["least"]
            number = nth(missing["round"])
            lines.append(f"round {number} has {here} of the {least} devices that it needs")
            known = missing["why"].items()
            lines += [f"{device} {why} (at {missing['time']})" for device, why in known]
        if history.metrics and (lags := history.metrics[-1].get("lag_by_device")):
            shares = some_names([f"{device} {lag:.1%}" for device, lag in lags.items()], MOST_LAGS)
            lines.append(f"devices lack of what the run has learned: {shares}")
        return lines


def _standing(tours: Mapping[str, Any] | None) -> list[str]:
    """Say where each device stood at the last merge, where nobody waits for anybody."""
    if tours is None:
        return []
    newest = tours["version"]
    return [
        f"{device} trains with version {on['version']} of {newest}, {on['staleness']} merges behind"
        for device, on in tours["on_tour"].items()
    ]
