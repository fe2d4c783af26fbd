"""What was decided in a run and why, and what went wrong in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.report.parts import Chart, Grid, Section, by_device, chart_of
from coordinator.report.run_sums import RunSums
from coordinator.results.events.event import nth, some_names
from coordinator.results.history import Row

# Rows of a table; a long run has more of both than anybody reads.
MOST_PLANS, MOST_TROUBLES = 60, 120
# Devices and reasons of one plan that are told.
MOST_CHANGES = 12
# What a person looks for when a run went wrong, and how it is said.
TROUBLES = {
    "device.left": "left",
    "device.delayed": "delayed",
    "message.rejected": "message rejected",
    "upload.refused": "adapters refused",
    "work.dropped": "adapters came too late",
    "waiting": "waited for",
    "devices.missing": "devices missing",
    "round.deadline": "over the round's deadline",
    "run.rewound": "went back",
    "step.skipped": "step without an update",
    "checkpoint.damaged": "checkpoint damaged",
    "tracker.left_out": "tracker left out",
}
# Why a device leaves whose owner wants it to, or at the end.
_BY_WILL = ("stopped", "completed")


def decided(facts: RunSums) -> Section:
    """Return plans over time, and why they were made."""
    plans = facts.history.plans
    if not plans:
        fixed = "Blocks and ranks were those of the configuration in every round."
        return Section("Plans", notes=[fixed])
    rows = []
    before: Mapping[str, Row] = {}
    for row in plans:
        plans_now = sorted(row["plans"].items())
        changes = list(filter(None, (_change(n, before.get(n), plan) for n, plan in plans_now)))
        if (more := len(changes) - MOST_CHANGES) > 0:
            changes[MOST_CHANGES:] = [f"and {more:,} more devices"]
        said = "; ".join(changes) or "as before"
        rows.append([str(nth(row["round"])), _reasons(row), said])
        before = row["plans"]
    notes = []
    if len(rows) > MOST_PLANS:
        notes.append(f"{len(rows) - MOST_PLANS} more, in the middle, are in plans.jsonl.")
        rows = [*rows[: MOST_PLANS // 2], *rows[-MOST_PLANS // 2 :]]
    grid = Grid(("from round", "why", "blocks and ranks that changed"), rows, num_texts=3)
    return Section("Plans", notes=notes, charts=_drawn(facts, plans), grids=[grid])


def _reasons(row: Row) -> str:
    reasons = list(row.get("reasons", []))
    if (more := len(reasons) - MOST_CHANGES) > 0:
        reasons[MOST_CHANGES:] = [f"and {more:,} more reasons"]
    return "; ".join(reasons)


def _change(device: str, before: Row | None, plan: Row) -> str:
    """Return what is new for a device; empty where nothing is."""
    if before is not None and before["split"] == plan["split"] and before["ranks"] == plan["ranks"]:
        return ""
    ranks = sorted(set(plan["ranks"].values()))
    said = "frozen" if ranks in ([], [0]) else f"ranks {ranks[0]}"
    if len(ranks) > 1:
        said = f"ranks {ranks[0]}-{ranks[-1]}"
    blocks = "1 block" if plan["split"] == 1 else f"{plan['split']} blocks"
    return f"{device}: {blocks}, {said}"


def _drawn(facts: RunSums, plans: list[dict[str, Any]]) -> list[Chart]:
    splits: dict[str, list[tuple[float, float]]] = {}
    means: dict[str, list[tuple[float, float]]] = {}
    last = max(facts.history.rounds_done, nth(plans[-1]["round"])) + 1
    for row in plans:
        for name, plan in row["plans"].items():
            x, ranks = float(nth(row["round"])), plan["ranks"].values()
            splits.setdefault(name, []).append((x, float(plan["split"])))
            if ranks:
                means.setdefault(name, []).append((x, sum(ranks) / len(ranks)))
    for found in (splits, means):
        for points in found.values():
            points.append((float(last), points[-1][1]))
    apart = "Equal values are drawn slightly apart."
    blocks, ranks = by_device(splits, stepped=True), by_device(means, stepped=True)
    charts = chart_of("Blocks on each device", blocks, "round", "blocks", apart)
    return charts + chart_of("Mean rank of its adapters", ranks, "round", "rank", apart)


def troubles(facts: RunSums) -> Section:
    """Return what went wrong, equal lines in a row as one."""
    found: list[list[Any]] = []
    for row in facts.history.events:
        said = TROUBLES.get(row["event"])
        if said is None or row.get("reason") in _BY_WILL or _is_first_wait(row):
            continue
        line = [said, _who(row), _why(row)]
        if found and found[-1][1:4] == line:
            found[-1][4] += 1
        else:
            found.append([row["time"], *line, 1])
    if not found:
        return Section("What went wrong", notes=["Nothing that the run has noticed."])
    notes = []
    if len(found) > MOST_TROUBLES:
        notes.append(f"The last {MOST_TROUBLES} of {len(found)}; all are in events.jsonl.")
        found = found[-MOST_TROUBLES:]
    rows = [[*line[:4], f"{line[4]} times" if line[4] > 1 else ""] for line in found]
    head = ("when", "what", "who", "why", "how often")
    return Section("What went wrong", notes=notes, grids=[Grid(head, rows, num_texts=5)])


def _is_first_wait(row: Row) -> bool:
    """Whether nobody has come yet whom a run waits for: it was started before its devices."""
    return row["event"] == "devices.missing" and not row["why"]


def _who(row: Row) -> str:
    if "device" in row:
        return str(row["device"])
    return some_names(list(map(str, row.get("devices", [])))) or str(row.get("tracker", "the run"))


def _why(row: Row) -> str:
    match row["event"]:
        case "waiting":
            return f"{row['what']}, {row['seconds']:.0f} s so far"
        case "devices.missing":
            why = [f"{name} {why}" for name, why in sorted(row["why"].items())]
            return "; ".join(why[:MOST_CHANGES])
        case "round.deadline":
            return f"{row['deadline_s']:g} s, round {nth(row['round'])}"
        case "step.skipped":
            return f"step {row['step']}: {row['reason']}"
        case "work.dropped":
            return f"round {nth(row['round'])}"
    return str(row.get("reason", row.get("error", "")))
