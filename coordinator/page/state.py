"""All that the page shows of one run, in parts that are sent anew only when they change.

It knows no browser and no socket.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.page.curves import curves, importance
from coordinator.page.devices import device_cards, rank_strips, totals
from coordinator.page.follow import FollowedFolder
from coordinator.page.pieces import Piece
from coordinator.page.stories import event_chunks, plan_rows, plannings
from coordinator.results.history import Row, RunHistory, overall
from coordinator.results.json_text import json_text
from coordinator.results.lifecycle import IMPORTANCE
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import LIVE, SAMPLES
from coordinator.results.run_lock import is_held
from coordinator.results.standing.standing import Standing, stand

# Times of a simulation.
CLOCK = "clock.jsonl"
# Texts of the coordinator's own prompts that are told, and letters of each.
MOST_SAMPLES, MOST_LETTERS = 60, 2000


class PageState:
    """What is known of the run in a folder; `refresh` looks again."""

    def __init__(self, path: Path) -> None:
        self._folder = FollowedFolder(path)
        self._mark: tuple[object, ...] = ()
        self._config: ServeConfig | None = None
        self.parts: dict[str, Piece] = {}
        """By name; a new dict whenever something has changed."""
        self.version = 0
        """Of the newest part."""

    def refresh(self) -> bool:
        """Look at the run's files; return whether there is something new.

        Raises:
            EdgeError: the folder holds no run, or one that cannot be read.
        """
        held = is_held(self._folder.path)
        mark = (held, *self._folder.mark())
        if mark == self._mark:
            return False
        if self._config is None:
            self._config = read_config(self._folder.path)
        found = run_parts(self._folder, self._config)
        self._mark = mark
        parts, before = {}, self.parts
        for name, value in found.items():
            text = json_text(value)
            old = before.get(name)
            if old is None or old.text != text:
                self.version += 1
                old = Piece(self.version, text)
            parts[name] = old
        if parts == before:
            return False
        if before.keys() - parts.keys():
            self.version += 1
        self.parts = parts
        return True


def run_parts(folder: FollowedFolder, config: ServeConfig) -> dict[str, Any]:
    """Return everything that is shown of the run in *folder*, by the names of the parts."""
    now = datetime.now().astimezone()
    history, live = RunHistory(folder), _read_live(folder)
    standing = stand(folder, config, now)
    cards = device_cards(standing, history, config, live)
    kinds, strips = rank_strips(standing, history, config)
    blocks = [row["blocks"] for row in history.events if row["event"] == "model"]
    deepest = max((one.split or 0 for one in standing.devices), default=0)
    return {
        "run": _about(standing, history, config, live) | {"is_simulated": bool(folder.rows(CLOCK))},
        "totals": totals(cards.values()),
        "model": {
            "blocks": blocks[-1] if blocks else None,
            "deepest": deepest,
            "kinds": kinds,
            "strips": strips,
        },
        **{f"device:{name}": card for name, card in cards.items()},
        "curves": curves(history, folder.rows(CLOCK)),
        "importance": importance(history, folder.rows(IMPORTANCE)),
        "plan": plan_rows(history, standing.planned_round),
        "plannings": plannings(history, standing.planned_round),
        "timeline": _timeline(live),
        "samples": _samples(folder),
        **event_chunks(history),
    }


def _read_live(folder: FollowedFolder) -> dict[str, Any]:
    try:
        found = json.loads((folder.path / LIVE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and "devices" in found else {}


def _about(
    standing: Standing, history: RunHistory, config: ServeConfig, live: Row
) -> dict[str, Any]:
    times = [row["time"] for row in history.events]
    first = history.metrics[0] if history.metrics else {}
    return {
        "name": standing.run,
        "model": Path(config.model).name,
        "preset": config.preset,
        "state": standing.state,
        "tone": _tone(standing),
        "is_running": standing.is_running,
        "round": standing.round,
        "rounds": standing.rounds,
        "rounds_done": history.rounds_done,
        "step": standing.step,
        "total_steps": standing.total_steps,
        "steps_per_s": live.get("steps_per_s") if standing.is_running else None,
        "loss": standing.loss,
        "first_loss": _first_loss(first),
        "began": times[0] if times else None,
        "changed": max([*times[-1:], *([live["time"]] if live else [])], default=None),
        "round_left_s": standing.round_left_s,
        "run_left_s": standing.run_left_s,
        "how": {
            "labels": config.labels,
            "rounds": config.round_mode,
            "aggregation": config.aggregation,
            "split": config.planning.split,
            "ranks": config.planning.ranks,
            "waves": config.waves,
            "trained_by": config.trained_by,
        },
    }


def _first_loss(row: Row) -> float | None:
    score = overall(row) if row else None
    return None if score is None else score.loss


def _tone(standing: Standing) -> str:
    if standing.is_complete:
        return "done"
    if not standing.is_running:
        return "rest" if standing.is_orderly else "off"
    return "training" if standing.state == "running" else "late"


def _timeline(live: Row) -> dict[str, Any]:
    found = live.get("timeline")
    return found if isinstance(found, dict) else {"now_s": 0.0, "steps": [], "computed": []}


def _samples(folder: FollowedFolder) -> list[dict[str, Any]]:
    """Return texts that the coordinator wrote to its own prompts, the newest last."""
    found = []
    for row in folder.rows(SAMPLES)[-MOST_SAMPLES:]:
        told: dict[str, Any] = {"round": row.get("round")}
        for key in ("prompt", "text"):
            told[key] = str(row.get(key, ""))[:MOST_LETTERS]
        found.append(told)
    return found
