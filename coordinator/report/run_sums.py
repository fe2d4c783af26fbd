"""A run's rows, summed up once for all parts of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.results.history import Row, RunHistory
from coordinator.results.run_folder import RunFolder
from coordinator.results.session_counters import DOWN, UP, SessionCounters

# Written by the laboratory, where time is modelled.
CLOCK = "clock.jsonl"


@dataclass
class DeviceSums:
    """What one device has done in the whole run."""

    rounds: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    peak_bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Bytes of its messages by what they carry, as `traffic.py` names it."""
    joules: float | None = None
    boards: list[tuple[int, Row]] = field(default_factory=list)
    """What its board said, and after how many rounds."""


def _measured(own: Row) -> tuple[float, float]:
    return own.get("compute_s", 0.0), own.get("wait_s", 0.0)


def _modelled(row: Row) -> dict[str, tuple[float, float]]:
    whole_s = row["round_seconds"]
    devices: Mapping[str, Row] = row["devices"]
    return {n: (own["compute_s"], whole_s - own["compute_s"]) for n, own in devices.items()}


class RunSums:
    """What a report reads of a run."""

    def __init__(self, folder: RunFolder, config: ServeConfig) -> None:
        self.folder, self.config = folder, config
        self.history = RunHistory(folder)
        self.metrics, self.costs = self.history.metrics, self.history.costs
        self.clock: list[dict[str, Any]] = folder.rows(CLOCK)
        self.devices: dict[str, DeviceSums] = {}
        self.bytes_at: dict[int, int] = {0: 0}
        """Bytes of all devices both ways, by rounds done."""
        self._bytes = SessionCounters[int]()
        self._joules = SessionCounters[float]()  # a program's, which may have many sessions
        for row in self.costs:
            self._take(row["round"] + 1, row["devices"])
            self.bytes_at[row["round"] + 1] = self._bytes.total(UP) + self._bytes.total(DOWN)
        self.times: dict[int, dict[str, tuple[float, float]]] = {
            row["round"] + 1: {name: _measured(own) for name, own in row["devices"].items()}
            for row in self.costs
        }
        """Seconds of computing and of waiting in a round by device, by rounds done."""
        self.times |= {row["round"]: _modelled(row) for row in self.clock}
        for row in self.clock:
            for name, own in row["devices"].items():
                mine = self.devices.setdefault(name, DeviceSums())
                mine.joules = (mine.joules or 0.0) + own["energy_j"]
        for at in self.times.values():
            for name, (compute_s, wait_s) in at.items():
                self.devices[name].compute_s += compute_s
                self.devices[name].wait_s += wait_s

    def _take(self, done: int, devices: Mapping[str, Row]) -> None:
        for name, row in devices.items():
            mine = self.devices.setdefault(name, DeviceSums())
            mine.rounds += 1
            mine.tokens += row.get("tokens", 0)
            ways = {way: row[way] for way in (UP, DOWN) if way in row}
            mine.kinds = self._bytes.take(name, {**ways, **row.get("traffic", {})})
            mine.up_bytes, mine.down_bytes = mine.kinds.pop(UP, 0), mine.kinds.pop(DOWN, 0)
            mine.peak_bytes = max(mine.peak_bytes, row.get("peak_bytes", 0))
            if board := row.get("board"):
                mine.boards.append((done, board))
                if "energy" in board:
                    mine.joules = self._joules.take(name, {"energy": board["energy"]})["energy"]

    def seconds_at(self) -> dict[int, float]:
        """Return the seconds since the start by rounds done: modelled ones, where there are any."""
        if self.clock:
            return {0: 0.0, **{row["round"]: row["seconds"] for row in self.clock}}
        ends = accumulate(row["seconds"] for row in self.costs)
        rounds = [row["round"] + 1 for row in self.costs]
        return {0: 0.0, **dict(zip(rounds, ends, strict=True))}

    @property
    def is_modelled(self) -> bool:
        """Whether time is."""
        return bool(self.clock)

    def board_names(self) -> dict[str, str]:
        """Return what boards the devices have, as far as the planner was told."""
        saved = self.folder.checkpoints()
        try:
            state = json.loads((saved[-1] / "state.json").read_bytes()) if saved else {}
            profiles = state["planner"]["profiles"]
            return {name: str(p["board"]) for name, p in profiles.items() if p.get("board")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
