"""Which runs a page shows: one, or those below a folder, as of an experiment or a comparison."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from coordinator.results.run_config import read_config
from coordinator.results.run_folder import CONFIG, RunFolder
from coordinator.results.standing.standing import stand
from edge_sdk.errors import ConfigError, EdgeError, one_line

log = logging.getLogger(__name__)

# Runs that are listed, the newest.
MOST_RUNS = 100


class Runs:
    """The runs in *folder*, in those below it, or in `runs` below it."""

    def __init__(self, folder: Path) -> None:
        self._is_one = (folder / CONFIG).is_file()
        self._folder = folder
        if self._is_one:
            return
        if not any(folder.glob(f"*/{CONFIG}")) and any(folder.glob(f"runs/*/{CONFIG}")):
            self._folder = folder / "runs"
        if not any(self._folder.glob(f"*/{CONFIG}")):
            raise ConfigError(f"{folder} is no run folder, and no run is below it")

    def _paths(self) -> dict[str, Path]:
        """Return the runs there are now by name, the newest first."""
        if self._is_one:
            return {self._folder.name: self._folder}
        found = sorted(self._folder.glob(f"*/{CONFIG}"), key=_made, reverse=True)
        return {path.parent.name: path.parent for path in found[:MOST_RUNS]}

    def find(self, name: str | None) -> Path | None:
        """Return the folder of a run by its name, without one that of the newest; else None."""
        paths = self._paths()
        return next(iter(paths.values()), None) if not name else paths.get(name)

    def listed(self) -> list[dict[str, Any]]:
        """Return what is to be told of each run where there are several, the newest first."""
        if self._is_one:
            return [{"name": self._folder.name}]
        return [_told(path) for path in self._paths().values()]


def _told(path: Path) -> dict[str, Any]:
    try:
        found = stand(RunFolder(path), read_config(path), datetime.now().astimezone())
    except (EdgeError, KeyError, TypeError, ValueError) as error:
        log.info("page.unreadable run=%s reason=%s", path.name, one_line(error))
        return {"name": path.name, "state": "cannot be read"}
    return {
        "name": path.name,
        "state": found.state,
        "round": found.round,
        "rounds": found.rounds,
        "loss": found.loss,
    }


def _made(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
