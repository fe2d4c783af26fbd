"""Who did what in a run: blocks, ranks, tokens, waits, bytes by kind, energy."""

from __future__ import annotations

from coordinator.report.parts import (
    Chart,
    Grid,
    Section,
    by_device,
    chart_of,
    mebibytes,
    megabytes,
    text_of,
)
from coordinator.report.run_sums import DeviceSums, RunSums
from coordinator.report.svg import Bar, bar_chart

# Bars of single devices; a fleet is in the table.
MOST_BARS = 24
KINDS = {
    "activations_up": "activations up",
    "activations_down": "activations down",
    "gradients_up": "gradients up",
    "gradients_down": "gradients down",
    "adapters_up": "adapters up",
    "round_starts_down": "round starts and residuals down",
    "parts_down": "parts of the model down",
}
OTHER = "frames, acks and the rest"


def work(facts: RunSums) -> Section:
    """Return who did what."""
    boards, joined = facts.board_names(), _joined(facts)
    # Of the last round that is done: what was planned after it has done nothing yet.
    plans = facts.history.plans_in(max(0, facts.history.rounds_done - 1))
    rows = []
    for name, own in sorted(facts.devices.items()):
        plan = plans.get(name)
        split = plan["split"] if plan else joined.get(name, {}).get("split")
        ranks = plan["ranks"].values() if plan else [facts.config.settings(name).r]
        taken = own.compute_s + own.wait_s
        rows.append(
            [
                name,
                boards.get(name, "-"),
                text_of(split),
                _span([rank for rank in ranks if rank is not None]),
                text_of(joined.get(name, {}).get("samples")),
                text_of(own.rounds),
                text_of(own.tokens),
                text_of(own.tokens / taken if taken else None),
                text_of(own.compute_s, ",.1f"),
                text_of(own.wait_s, ",.1f"),
                mebibytes(own.peak_bytes or None),
            ]
        )
    head = ("device", "board", "blocks", "ranks", "rows held", "rounds", "tokens", "tokens/s")
    grid = Grid((*head, "computing s", "waiting s", "program MiB"), rows, num_texts=2)
    charts = _shares(facts) + _rates(facts)
    return Section("Who did what", charts=charts, grids=[grid] if rows else [])


def _joined(facts: RunSums) -> dict[str, dict[str, int]]:
    rows = (row for row in facts.history.events if row["event"] == "device.joined")
    return {row["device"]: row for row in rows}


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _shares(facts: RunSums) -> list[Chart]:
    bars = [
        Bar(name, (own.compute_s, own.wait_s), f"{own.compute_s + own.wait_s:,.0f} s")
        for name, own in sorted(facts.devices.items())[:MOST_BARS]
    ]
    svg = bar_chart(bars, "computing and waiting")
    legend = [(0, "computing"), (1, "waiting for others, link and coordinator")]
    return [Chart("Computing and waiting in steps", svg, legend)] if svg else []


def _rates(facts: RunSums) -> list[Chart]:
    rates: dict[str, list[tuple[float, float]]] = {}
    for row in facts.costs:
        done = row["round"] + 1
        for name, own in row["devices"].items():
            taken = sum(facts.times[done].get(name, (0.0, 0.0)))
            if taken > 0:
                rates.setdefault(name, []).append((done, own["tokens"] / taken))
    title = "Tokens a second in steps, waiting included"
    return chart_of(title, by_device(rates), "round", "tokens/s")


# ---- traffic ----


def traffic(facts: RunSums) -> Section:
    """Return what travelled, by what it carried."""
    kinds = [kind for kind in KINDS if any(own.kinds.get(kind) for own in facts.devices.values())]
    titles = [KINDS[kind] for kind in kinds]
    rows, bars = [], []
    for name, own in sorted(facts.devices.items()):
        parts = [own.kinds.get(kind, 0) for kind in kinds]
        rest = max(0, own.up_bytes + own.down_bytes - sum(parts))
        total = own.up_bytes + own.down_bytes
        rows.append([name, *map(megabytes, (own.up_bytes, own.down_bytes, *parts, rest))])
        bars.append(Bar(name, (*parts, rest), f"{megabytes(total)} MB"))
    if len(rows) > 1:
        rows.append(["all", *_sums(list(facts.devices.values()), kinds)])
    head = ("device (MB)", "up", "down", *titles, OTHER)
    svg = bar_chart(bars[:MOST_BARS], "bytes by kind")
    legend = [*enumerate((*titles, OTHER))]
    charts = [Chart("What travelled", svg, legend)] if svg else []
    return Section("Traffic", charts=charts, grids=[Grid(head, rows)] if rows else [])


def _sums(devices: list[DeviceSums], kinds: list[str]) -> list[str]:
    up, down = sum(d.up_bytes for d in devices), sum(d.down_bytes for d in devices)
    parts = [sum(d.kinds.get(kind, 0) for d in devices) for kind in kinds]
    return [megabytes(n) for n in (up, down, *parts, max(0, up + down - sum(parts)))]


# ---- boards ----


def boards(facts: RunSums) -> Section:
    """Return energy, temperature and memory, as far as boards told them."""
    told = {
        name: own
        for name, own in sorted(facts.devices.items())
        if own.boards or own.joules is not None
    }
    if not told:
        said = "No board told its energy, temperature or memory."
        return Section("Energy, temperature and memory", notes=[said])
    rows = []
    for name, own in told.items():
        powers, heats = _values(own, "power"), _values(own, "temperature")
        taken = [
            board["memory_total"] - board["memory_available"]
            for _, board in own.boards
            if "memory_total" in board and "memory_available" in board
        ]
        slow = sum(bool(board.get("throttled")) for _, board in own.boards)
        per = own.joules / own.tokens * 1000 if own.joules and own.tokens else None
        rows.append(
            [
                name,
                text_of(own.joules),
                text_of(per, ",.2f"),
                text_of(sum(powers) / len(powers) if powers else None, ",.1f"),
                text_of(max(heats, default=None), ".0f"),
                mebibytes(max(taken, default=None)),
                text_of(slow) if own.boards else "-",
            ]
        )
    head = ("device", "energy J", "J per 1,000 tokens", "mean power W", "highest deg C")
    grid = Grid((*head, "board MiB taken", "rounds slowed down"), rows)
    charts = []
    for key, title, label in (
        ("temperature", "Temperature", "degrees Celsius"),
        ("power", "Power", "W"),
    ):
        lines = {
            name: [(float(done), float(board[key])) for done, board in own.boards if key in board]
            for name, own in told.items()
        }
        charts += chart_of(title, by_device({n: p for n, p in lines.items() if p}), "round", label)
    modelled = ["Energy is modelled: the board's watts while it computes."]
    notes = modelled if facts.is_modelled else []
    return Section("Energy, temperature and memory", notes, charts, [grid])


def _values(own: DeviceSums, key: str) -> list[float]:
    return [float(board[key]) for _, board in own.boards if key in board]
