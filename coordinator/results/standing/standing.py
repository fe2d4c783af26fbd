"""Where a run stands, read from its folder alone: it may go on in another process, or nowhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.results.events.event import nth
from coordinator.results.history import Row, RunHistory, overall
from coordinator.results.lifecycle import PAUSED, STOPPED, has_ended
from coordinator.results.run_folder import CLOCK, LIVE, SIMULATION, RunFolder
from coordinator.results.run_lock import is_held

# Rounds whose mean says how long the next ones take.
LATEST_ROUNDS = 3
# What tells of trouble with a device, and the key under which an event says which.
_TROUBLE = {
    "device.left": "reason",
    "device.delayed": "reason",
    "message.rejected": "error",
    "upload.refused": "reason",
}
# Why a device leaves whose owner wants it to.
_BY_WILL = ("stopped", "completed")


@dataclass(frozen=True, kw_only=True)
class DeviceStanding:
    """One device in a run."""

    name: str
    doing: str = ""
    """What it does now, in a few words; empty where the run does not go on."""
    split: int | None = None
    """Blocks that it holds."""
    ranks: str = ""
    """Ranks of its adapters: one number, or least and most."""
    step: int | None = None
    """Steps done, by its last report."""
    loss: float | None = None
    """Of its last step."""
    tokens_per_s: float | None = None
    bytes_up: int = 0
    """From the device, in the whole run."""
    bytes_down: int = 0
    peak_bytes: int = 0
    """Most memory of its program."""
    memory_bytes: int | None = None
    """Memory of the whole board that is taken, by its last sign of life."""
    temperature: float | None = None
    """Degrees Celsius, by its last sign of life."""
    trouble: str = ""
    """The last that went wrong with it, or kept it waiting."""
    trouble_time: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A run at a moment."""

    run: str
    state: str
    """In words, for a person."""
    is_running: bool
    """Whether a coordinator holds it."""
    is_complete: bool
    is_orderly: bool
    """Whether nobody holds it because somebody wanted that: paused or stopped."""
    is_between: bool
    """Whether no round goes on: it has ended, and `round` counts those that are done."""
    round: int
    """The round that goes on, or is next, as people count; the last one where all are done, or
    where it has ended between two."""
    rounds: int
    step: int
    total_steps: int
    loss: float | None
    """Newest: on the coordinator's file, the devices' data, or of training."""
    age_s: float | None
    """Since it was begun."""
    quiet_s: float | None
    """Since it last wrote anything down."""
    round_left_s: float | None
    """Seconds to the end of the round, by the pace so far; None where that is unknown."""
    run_left_s: float | None
    devices: tuple[DeviceStanding, ...]

    @property
    def planned_round(self) -> int:
        """The last round whose plans count, from 0: not one that was planned and never began."""
        return self.round - 1 if self.is_between else self.rounds


def stand(folder: RunFolder, config: ServeConfig, now: datetime) -> Standing:
    """Return where the run in *folder* stands at *now*, which has a time zone."""
    history, live = RunHistory(folder), _read_live(folder)
    is_running, is_complete = is_held(folder.path), has_ended(folder)
    done = history.rounds_done
    step = _step(folder, history, config, live if is_running else {})
    is_orderly = not is_running and not is_complete and _outcome(history) in _ENDINGS
    is_between = is_complete or (is_orderly and done > 0 and step <= done * config.steps_per_round)
    round_ = done if is_between else min(config.rounds, nth(done))
    round_left_s, run_left_s = None, None
    if is_running and not is_complete:
        round_left_s, run_left_s = _left_s(history, config, live, step)
    times = [row["time"] for row in history.events]
    return Standing(
        run=folder.name,
        state=_state(folder, history, config, live, step),
        is_running=is_running,
        is_complete=is_complete,
        is_orderly=is_orderly,
        is_between=is_between,
        round=round_,
        rounds=config.rounds,
        step=step,
        total_steps=config.total_steps,
        loss=_loss(history),
        age_s=_since(times[0], now) if times else None,
        quiet_s=_since(max([*times[-1:], *([live["time"]] if live else [])]), now)
        if times
        else None,
        round_left_s=round_left_s,
        run_left_s=run_left_s,
        devices=_devices(
            history,
            config,
            live,
            planned_round=round_ - 1 if is_between else config.rounds,
            is_running=is_running,
        ),
    )


def _read_live(folder: RunFolder) -> dict[str, Any]:
    try:
        found = json.loads((folder.path / LIVE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "devices" in found else {}


def _since(time: str, now: datetime) -> float:
    return max(0.0, (now - datetime.strptime(time, CLOCK)).total_seconds())


# ---- the run ----


def _state(
    folder: RunFolder, history: RunHistory, config: ServeConfig, live: Row, step: int
) -> str:
    """Return the state of a run in words."""
    if has_ended(folder):
        is_early = config.early_stopping.is_on and history.rounds_done < config.rounds
        early = ", ended early" if is_early else ""
        writes = "; its result is being written" if is_held(folder.path) else ""
        return f"complete{early}{writes}"
    if is_held(folder.path):
        return _going_on(history, live)
    where = f"step {step} of {config.total_steps}"
    if not folder.has_checkpoint():
        return "ended before its first checkpoint; `coordinator resume` begins it anew"
    outcome = _outcome(history)
    doing = _ENDINGS.get(outcome, "ended without a word")
    result = ", its result is exported" if outcome == STOPPED and history.rounds_done else ""
    is_simulated = (folder.path / SIMULATION).is_file()
    return f"{doing} at {where}{result}{'' if is_simulated else ', resumable'}"


_ENDINGS = {PAUSED: "paused", STOPPED: "stopped"}


def _outcome(history: RunHistory) -> str:
    """Return how the run ended; empty where it said nothing."""
    rows = [row for row in history.events if row["event"] in ("run.started", "run.ended")]
    return str(rows[-1].get("outcome", "")) if rows else ""


def _going_on(history: RunHistory, live: Row) -> str:
    """Return what a run does that a coordinator holds."""
    wished = [row for row in history.events if row["event"] in ("run.started", "stop.asked")]
    if wished and wished[-1]["event"] == "stop.asked":
        unit = "round" if wished[-1]["after_round"] else "step"
        return f"{_doing(history, live)}; a {wished[-1]['wish']} after this {unit} was asked for"
    return _doing(history, live)


def _doing(history: RunHistory, live: Row) -> str:
    if (missing := history.missing()) is not None:
        lacking = missing["least"] - len(missing["ready"])
        noun = "device" if lacking == 1 else "devices"
        here = f"{len(missing['ready'])} of {missing['least']} are here"
        return f"waiting for {lacking} more {noun}: {here}"
    if waiting := history.waiting():
        return f"waiting for {', '.join(sorted(waiting))}"
    began = [row["event"] for row in history.events if row["event"] in _BEGINNINGS]
    is_stepping = live.get("step") is not None  # a coordinator that trains alone begins no rounds
    if not is_stepping and (not began or began[-1] != "round.started"):
        return "waiting for devices" if live else "starting"
    return "running"


_BEGINNINGS = ("run.started", "run.ended", "round.started")


def _step(folder: RunFolder, history: RunHistory, config: ServeConfig, live: Row) -> int:
    """Return how many steps are done: by a run that goes on, else by its last checkpoint."""
    if live and live["step"] is not None and config.round_mode == "synchronous":
        return int(live["step"])
    saved = folder.checkpoints()
    rows = [row["step"] for row in history.metrics[-1:] if isinstance(row.get("step"), int)]
    return int(saved[-1].name.rpartition("-")[2]) if saved and not live else max([0, *rows])


def _left_s(
    history: RunHistory, config: ServeConfig, live: Row, step: int
) -> tuple[float | None, float | None]:
    """Return how long the round and the run will take, by the pace so far."""
    latest = [row["seconds"] for row in history.costs[-LATEST_ROUNDS:]]
    rate = live.get("steps_per_s") if config.round_mode == "synchronous" else None
    rounds_after = config.rounds - history.rounds_done - 1
    if rounds_after < 0:
        return None, None
    here = None
    if rate and live.get("end_step") is not None:
        here = max(0, live["end_step"] - step) / rate
    whole = fmean(latest) if latest else config.steps_per_round / rate if rate else None
    if whole is None:
        return here, None
    return here, (whole if here is None else here) + rounds_after * whole


def _loss(history: RunHistory) -> float | None:
    """Return the newest loss that was measured: of an evaluation, else of training."""
    for row in reversed(history.metrics):
        if (score := overall(row)) is not None:
            return score.loss
        if row.get("train_loss") is not None:
            return float(row["train_loss"])
    return None


# ---- the devices ----


def _devices(
    history: RunHistory, config: ServeConfig, live: Row, *, planned_round: int, is_running: bool
) -> tuple[DeviceStanding, ...]:
    now: Mapping[str, Row] = live.get("devices", {})
    splits = {r["device"]: r["split"] for r in history.events if r["event"] == "device.joined"}
    names = {*config.devices, *history.devices(), *splits, *now}
    troubles = _troubles(history)
    plans = history.plans_in(planned_round)
    # At the end of a round its row knows more than the last step did.
    now_in = live.get("round")  # None: it has been resumed, and no round has begun yet
    is_newer = not history.costs or (now_in or 0) > history.costs[-1]["round"]
    found = []
    for name in sorted(names):
        mine, plan = now.get(name, {}), plans.get(name)
        board, last = mine.get("board") or _last_board(history, name), troubles.get(name, {})
        traffic = (mine.get("bytes_up", 0), mine.get("bytes_down", 0)) if is_newer else (0, 0)
        cost = history.cost(name, now=traffic)
        found.append(
            DeviceStanding(
                name=name,
                doing=mine.get("doing", "") if is_running else "",
                split=plan["split"] if plan else splits.get(name),
                ranks=_ranks(plan["ranks"].values() if plan else [config.settings(name).r]),
                step=mine.get("step"),
                loss=mine.get("loss"),
                tokens_per_s=mine.get("tokens_per_s") if is_running else None,
                bytes_up=cost.bytes_up,
                bytes_down=cost.bytes_down,
                peak_bytes=max(cost.peak_bytes, mine.get("peak_bytes", 0)),
                memory_bytes=_taken(board),
                temperature=board.get("temperature"),
                trouble=last.get("text", ""),
                trouble_time=last.get("time", ""),
            )
        )
    return tuple(found)


def _last_board(history: RunHistory, device: str) -> Row:
    """Return what a board said of itself at the end of its last round."""
    rows = [row["devices"].get(device, {}) for row in history.costs[-1:]]
    return rows[0].get("board", {}) if rows else {}


def _taken(board: Row) -> int | None:
    """Return the memory of a board that is taken, by whatever it says of it."""
    if "memory_total" in board and "memory_available" in board:
        return int(board["memory_total"] - board["memory_available"])
    return None


def _troubles(history: RunHistory) -> dict[str, dict[str, str]]:
    """Return the last trouble with each device, and when that was."""
    found = {}
    for row in history.events:
        key = _TROUBLE.get(row["event"])
        if key is not None and row.get(key) not in _BY_WILL:
            found[row["device"]] = {"text": str(row.get(key)), "time": row["time"]}
    return found


def _ranks(values: Any) -> str:
    ranks = sorted({int(rank) for rank in values if rank is not None})
    if not ranks:
        return ""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
