"""Where a run stands as a person reads it, in no more than the 80 columns of a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from coordinator.config.scoring import said
from coordinator.results.standing.standing import DeviceStanding, Standing
from edge_sdk.duration import duration
from edge_sdk.errors import printable

MB, MIB = 10**6, 2**20
# Letters of a device's name in the table; the lines below it hold the whole name.
NAME_WIDTH, SHORT_NAME = 14, 9
# Devices in the table, and lines about single ones, unless all are asked for.
MOST_DEVICES, MOST_LINES = 40, 20


def head(found: Standing) -> list[str]:
    """Return what the run as a whole does, in lines."""
    lines = [f"run {found.run}: {found.state}"]
    done = f"{found.round} of {found.rounds} rounds" if found.is_between else ""
    where = [
        done or f"round {found.round} of {found.rounds}",
        f"step {found.step} of {found.total_steps}",
    ]
    if found.loss is not None:
        where.append(f"loss {found.loss:.3f}")
    lines.append(", ".join(where))
    times = []
    if found.age_s is not None:
        times.append(f"begun {duration(found.age_s)} ago")
    if found.quiet_s is not None:
        times.append(f"last change {duration(found.quiet_s)} ago")
    if times:
        lines.append(", ".join(times))
    left = []
    if found.round_left_s is not None:
        left.append(f"this round ends in about {duration(found.round_left_s)}")
    if found.run_left_s is not None:
        left.append(f"the run in about {duration(found.run_left_s)}")
    if left:
        lines.append(", ".join(left))
    return lines


def device_table(devices: Sequence[DeviceStanding]) -> Table:
    """Return a row for each device: what it holds, how far and how fast it is, what it costs."""
    space = 1 if any(len(one.name) > SHORT_NAME for one in devices) else 2  # in 80 columns
    table = Table(box=None, padding=(0, space, 0, 0), pad_edge=False)
    headings = ("device", "blocks", "ranks", "step", "tok/s", "up MB", "down MB")
    for heading in (*headings, "peak MiB", "used MiB", "temp C"):
        side: Literal["left", "right"] = "left" if heading == "device" else "right"
        table.add_column(heading, justify=side, overflow="fold")
    for one in devices:
        short = one.name if len(one.name) <= NAME_WIDTH else one.name[: NAME_WIDTH - 1] + "~"
        table.add_row(
            printable(short),
            _count(one.split),
            one.ranks or "-",
            _count(one.step),
            _count(one.tokens_per_s),
            f"{one.bytes_up / MB:.1f}",
            f"{one.bytes_down / MB:.1f}",
            f"{one.peak_bytes / MIB:.0f}" if one.peak_bytes else "-",
            "-" if one.memory_bytes is None else f"{one.memory_bytes / MIB:.0f}",
            _count(one.temperature),
        )
    return table


def fleet_line(devices: Sequence[DeviceStanding]) -> str:
    """Return how many devices do what, for a fleet that no table shows; empty for few."""
    if len(devices) <= MOST_DEVICES or not any(one.doing for one in devices):
        return ""
    doing = Counter(one.doing.split(",")[0].split(":")[0] or "not here" for one in devices)
    told = [f"{count:,} {what}" for what, count in doing.most_common(4)]
    more = [f"{len(doing) - 4} other states"] if len(doing) > 4 else []
    return f"{len(devices):,} devices: {', '.join([*told, *more])}"


def shortened(lines: Sequence[str], most: int | None) -> list[str]:
    """Return *lines*, or the first of many and how many more there are; None: all of them."""
    if most is None or len(lines) <= most:
        return [*lines]
    return [*lines[:most], f"and {len(lines) - most:,} more lines; --all shows them"]


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def device_lines(devices: Iterable[DeviceStanding]) -> list[str]:
    """Return what devices do beside training, and the last trouble with each."""
    lines = [f"{one.name}: {one.doing}" for one in devices if one.doing not in ("", "training")]
    for one in devices:
        if one.trouble:
            lines.append(f"{one.name}, last trouble ({one.trouble_time}): {one.trouble}")
    return [printable(line) for line in lines]


def test_line(test: Mapping[str, Any]) -> str:
    """Return what the result does on the test file."""
    names = {"loss": ".4f", "perplexity": ".2f", "accuracy": ".1%"}
    found = {name: test.get(f"test_{name}") for name in names}
    parts = [f"{name} {value:{names[name]}}" for name, value in found.items() if value is not None]
    if counted := said({name.removeprefix("test_"): value for name, value in test.items()}):
        parts.append(counted)
    return f"test file, model of round {test.get('round')}: {', '.join(parts)}"


def run_table(runs: Sequence[Standing]) -> Table:
    """Return a row for each run."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("run", "state", "round", "devices", "loss", "age"):
        is_text = heading in ("run", "state")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for one in runs:
        table.add_row(
            printable(one.run),
            one.state,
            f"{one.round}/{one.rounds}",
            str(len(one.devices)),
            "-" if one.loss is None else f"{one.loss:.3f}",
            "-" if one.age_s is None else duration(one.age_s),
        )
    return table
