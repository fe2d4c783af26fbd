"""What a card of a device shows: pure functions of what the run's files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.page.weights import place_of
from coordinator.results.history import Row, RunHistory
from coordinator.results.standing.standing import DeviceStanding, Standing

# Kinds of weights that a strip of ranks has rows for, and blocks that it has columns for.
MOST_KINDS, MOST_BLOCKS = 16, 256
# Of a board's last sign of life.
_BOARD = ("memory_total", "memory_available", "temperature", "power", "energy", "throttled")
_SPENT = ("compute_s", "wait_s")
_RATES = ("up_bytes_per_s", "down_bytes_per_s")


def device_cards(
    standing: Standing, history: RunHistory, config: ServeConfig, live: Row
) -> dict[str, dict[str, Any]]:
    """Return a card for each device, by name."""
    now: Mapping[str, Row] = live.get("devices", {})
    offers = {row["device"]: row for row in history.events if row["event"] == "device.offers"}
    last = history.costs[-1]["devices"] if history.costs else {}
    late = history.waiting() if standing.is_running else {}
    reasons = {row["device"]: row for row in history.events if row["event"] == "device.left"}
    joined = {row["device"]: n for n, row in enumerate(history.events) if _is_coming(row)}
    left = {row["device"]: n for n, row in enumerate(history.events) if row["event"] in _LEAVING}
    cards = {}
    for one in standing.devices:
        mine, offer = now.get(one.name, {}), offers.get(one.name, {})
        is_gone = left.get(one.name, -1) > joined.get(one.name, -1)
        card = {
            "name": one.name,
            "tone": _tone(one, standing, is_late=one.name in late, is_gone=is_gone),
            "doing": _doing(one, late.get(one.name), reasons.get(one.name) if is_gone else None),
            "split": one.split,
            "ranks": one.ranks,
            "step": one.step,
            "loss": one.loss,
            "tokens_per_s": one.tokens_per_s,
            "bytes_up": one.bytes_up,
            "bytes_down": one.bytes_down,
            "peak_bytes": one.peak_bytes or None,
            "trouble": one.trouble,
            "trouble_time": one.trouble_time,
            "codec": config.settings(one.name).codec,
            "board": {key: offer.get(key) for key in _OFFERED},
        }
        board = mine.get("board") or last.get(one.name, {}).get("board", {})
        card |= {key: board.get(key) for key in _BOARD}
        totals = last.get(one.name, {})
        card |= {key: mine.get(key, totals.get(key)) for key in _SPENT}
        card["is_round"] = "compute_s" not in mine
        card |= {key: mine.get(key) if standing.is_running else None for key in _RATES}
        cards[one.name] = card
    return cards


_OFFERED = ("board", "power_mode", "up_bytes_per_s", "down_bytes_per_s", "round_trip_s")
_LEAVING = ("device.left",)


def _is_coming(row: Row) -> bool:
    return row["event"] in ("device.joined", "device.offers")


def _doing(one: DeviceStanding, late: Row | None, left: Row | None) -> str:
    if late is not None:
        return f"{one.doing or 'late'}; the run waits for it: {late['what']}"
    if not one.doing and left is not None:
        return f"left: {left['reason']}"
    return one.doing


def _tone(one: DeviceStanding, standing: Standing, *, is_late: bool, is_gone: bool) -> str:
    """Return a word for what state a device is in."""
    if not standing.is_running:
        return "done" if standing.is_complete else "rest" if standing.is_orderly else "off"
    if is_gone or one.doing.startswith("left"):
        return "off"
    if is_late or one.doing.startswith(("silent", "waits: no plan", "rests")):
        return "late"
    if one.doing == "training":
        return "training"
    return "ready" if one.doing.startswith("ready") else "coming"


def rank_strips(
    standing: Standing, history: RunHistory, config: ServeConfig
) -> tuple[list[str], dict[str, list[list[int]]]]:
    """Return kinds of weights, and by device a row of ranks by kind for each of its blocks.

    -1 stands where there is no adapter. Where nothing was planned all of a device's adapters have
    one rank, and there is one kind.
    """
    plans = history.plans_in(standing.planned_round)
    found = {name: _by_block(plan["ranks"]) for name, plan in plans.items()}
    kinds = sorted({kind for blocks in found.values() for _, kind in blocks})[:MOST_KINDS]
    strips = {}
    for one in standing.devices:
        blocks = range(min(MOST_BLOCKS, one.split or 0))
        ranks = found.get(one.name)
        if ranks is None:
            rank = config.settings(one.name).r
            strips[one.name] = [[-1 if rank is None else rank] for _ in blocks]
        else:
            strips[one.name] = [[ranks.get((b, kind), -1) for kind in kinds] for b in blocks]
    return kinds or ["all adapters"], strips


def _by_block(ranks: Mapping[str, int]) -> dict[tuple[int, str], int]:
    return {place: rank for name, rank in ranks.items() if (place := place_of(name)) is not None}


def totals(cards: Iterable[Row]) -> dict[str, Any]:
    """Return what all devices do together."""
    rates, powers, energies = [], [], []
    up = down = training = count = 0
    for card in cards:
        count += 1
        training += card["tone"] == "training"
        rates += [card["tokens_per_s"]] if card["tokens_per_s"] is not None else []
        powers += [card["power"]] if card["power"] is not None else []
        energies += [card["energy"]] if card["energy"] is not None else []
        up, down = up + card["bytes_up"], down + card["bytes_down"]
    return {
        "devices": count,
        "training": training,
        "tokens_per_s": sum(rates) if rates else None,
        "power": sum(powers) if powers else None,
        "energy": sum(energies) if energies else None,
        "bytes_up": up,
        "bytes_down": down,
    }
