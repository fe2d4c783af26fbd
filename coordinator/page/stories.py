"""What happened and what was planned, in words: a line of a run's files as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator.results.events.event import nth
from coordinator.results.history import Row, RunHistory

# Events that are shown, the newest, and how many of them are sent at once.
MOST_EVENTS, CHUNK = 600, 40
# Plannings that are told, and devices of each whose change is.
MOST_PLANNINGS, MOST_MOVED = 30, 6
# How an event is shown: as one of the run, of a device, as trouble, or as its end.
RUN, DEVICE, TROUBLE = "run", "device", "trouble"

_WORDS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "model": (RUN, lambda r: f"the model has {r['blocks']} blocks"),
    "run.started": (RUN, lambda r: f"the run begins at step {r['step']}"),
    "plans.made": (
        RUN,
        lambda r: f"plans from round {nth(r['round'])} on for {_who(list(r['why']))}",
    ),
    "run.ended": (RUN, lambda r: f"the run has ended: {r['outcome']}"),
    "run.rewound": (TROUBLE, lambda r: f"back to the last good state: {r['reason']}"),
    "adapter.exported": (RUN, lambda r: f"adapter written, {_checked(r)}"),
    "model.exported": (RUN, lambda r: f"model written, {_checked(r)}"),
    "checkpoint.damaged": (TROUBLE, lambda r: f"{r['checkpoint']} is damaged: {r['reason']}"),
    "round.started": (RUN, lambda r: f"round {nth(r['round'])} begins with {_who(r['devices'])}"),
    "round.deadline": (
        TROUBLE,
        lambda r: f"round {nth(r['round'])} goes on without {_who(r['devices'])}: too late",
    ),
    "tours.merged": (RUN, lambda r: f"version {r['version']}, of {_who(list(r['updates']))}"),
    "step.skipped": (TROUBLE, lambda r: f"step {r['step']} was left out: {r['reason']}"),
    "device.enrolled": (
        DEVICE,
        lambda r: f"enrolled from {r['address']}, with the key {r['fingerprint']}",
    ),
    "device.joined": (
        DEVICE,
        lambda r: f"ready with {r['split']} blocks and {r['samples']:,} samples",
    ),
    "device.offers": (DEVICE, lambda r: _offer(r)),
    "device.left": (TROUBLE, lambda r: f"left: {r['reason']}"),
    "device.delayed": (TROUBLE, lambda r: str(r["reason"])),
    "message.rejected": (TROUBLE, lambda r: f"a message was rejected: {r['error']}"),
    "waiting": (
        TROUBLE,
        lambda r: f"{r['what']}: waiting {r['seconds']:.0f} s for {_who(r['devices'])}",
    ),
    "waiting.over": (DEVICE, lambda r: f"waited for, {r['seconds']:.0f} s in all: {r['what']}"),
    "devices.missing": (
        TROUBLE,
        lambda r: (
            f"round {nth(r['round'])} has {len(r['ready'])} of the {r['least']} devices that it "
            "needs"
        ),
    ),
    "work.dropped": (TROUBLE, lambda r: f"its work of round {nth(r['round'])} came too late"),
    "upload.refused": (TROUBLE, lambda r: f"its adapters were left out: {r['reason']}"),
}
# Why a device leaves whose owner wants it to.
_BY_WILL = ("stopped", "completed")


def event_chunks(history: RunHistory, first: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the newest events in pieces of which only the last one changes, by `events:N`."""
    rows = history.events
    begin = max(first, len(rows) - MOST_EVENTS) // CHUNK
    return {
        f"events:{n}": [_told(row) for row in rows[n * CHUNK : (n + 1) * CHUNK]]
        for n in range(begin, -(-len(rows) // CHUNK))
    }


def _told(row: Row) -> dict[str, Any]:
    kind = str(row.get("event", ""))
    tone, words = _WORDS.get(kind, (RUN, _plain))
    try:
        text = words(row)
    except (KeyError, TypeError, ValueError, AttributeError):  # a line of another version
        text = _plain(row)
    if kind == "device.left" and row.get("reason") in _BY_WILL:
        tone = DEVICE
    device = row.get("device")
    return {
        "time": row.get("time"),
        "kind": kind,
        "tone": tone,
        "device": device if isinstance(device, str) else None,
        "text": text[:500],
    }


def _plain(row: Row) -> str:
    known = {key: value for key, value in row.items() if key not in ("time", "event", "device")}
    return ", ".join(f"{key} {value}" for key, value in known.items())


def _checked(row: Row) -> str:
    return f"read back: logits differ by {row['difference']:.0e} at most"


def _who(names: Sequence[str]) -> str:
    """Return names, or how many where they are many."""
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} devices"


def _offer(row: Row) -> str:
    parts = [str(row["board"])] if row.get("board") else []
    for key, word in (("memory_bytes", "of memory"), ("flops_per_s", "FLOP/s")):
        if isinstance(row.get(key), int | float):
            size = f"{row[key] / 2**30:.1f} GiB" if key == "memory_bytes" else f"{row[key]:.2g}"
            parts.append(f"{size} {word}")
    return f"offers {', '.join(parts)}" if parts else "has told what it offers"


# ---- plans ----


def plannings(history: RunHistory, rounds: int) -> list[dict[str, Any]]:
    """Return what was planned, oldest first: why, what it is worth, and what moved.

    A plan for a round after *rounds*, from 0, has never been in force.
    """
    found = []
    before: Mapping[str, Row] = {}
    rows = [row for row in history.plans if row["round"] <= rounds]
    for row in rows:
        plans: Mapping[str, Row] = row.get("plans", {})
        found.append(
            {
                "round": nth(row["round"]),
                "reasons": [str(reason)[:300] for reason in row.get("reasons", [])],
                "wave_s": row.get("wave_s"),
                "utility": row.get("utility"),
                "refused": dict(row.get("refused", {})),
                "moved": _moved(before, plans),
            }
        )
        before = plans
    return found[-MOST_PLANNINGS:]


def _moved(before: Mapping[str, Row], plans: Mapping[str, Row]) -> list[str]:
    """Return how blocks and ranks of devices have changed, a line each."""
    lines = []
    for name, plan in plans.items():
        old = before.get(name)
        if old is None:
            continue
        parts = []
        if old["split"] != plan["split"]:
            parts.append(f"{old['split']} to {plan['split']} blocks")
        if (was := _mean(old["ranks"])) != (now := _mean(plan["ranks"])):
            parts.append(f"mean rank {was:.1f} to {now:.1f}")
        elif old["ranks"] != plan["ranks"] and old["split"] == plan["split"]:
            parts.append("other ranks, equal mean")
        if parts:
            lines.append(f"{name}: {', '.join(parts)}")
    if len(lines) > MOST_MOVED:
        lines[MOST_MOVED:] = [f"and {len(lines) - MOST_MOVED} more devices"]
    return lines


def _mean(ranks: Mapping[str, int]) -> float:
    return sum(ranks.values()) / len(ranks) if ranks else 0.0


def plan_rows(history: RunHistory, rounds: int) -> list[dict[str, Any]]:
    """Return the plan in force, a row for each device with what bounds it, where it was said."""
    newest = next((row for row in reversed(history.plans) if row["round"] <= rounds), None)
    if newest is None:
        return []
    made = [row for row in history.events if row["event"] == "plans.made"]
    told = (row["why"] for row in reversed(made) if row["round"] <= rounds)
    why: Mapping[str, Row] = next(told, {})
    rows = []
    for name, plan in sorted(newest["plans"].items()):
        story, ranks = why.get(name, {}), list(plan["ranks"].values())
        rows.append(
            {
                "device": name,
                "blocks": plan["split"],
                "least_rank": min(ranks, default=None),
                "most_rank": max(ranks, default=None),
                "mean_rank": _mean(plan["ranks"]) if ranks else None,
                "adapters": sum(rank > 0 for rank in ranks),
                "bound_by": story.get("bound_by"),
                "needs_bytes": story.get("needs_bytes"),
                "budget_bytes": story.get("budget_bytes"),
                "wave_s": story.get("wave_s"),
            }
        )
    return rows
