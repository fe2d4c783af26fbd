"""A run as a person at a terminal sees it: bars where there is a terminal, lines where not."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from coordinator.config.scoring import said
from coordinator.results.events.devices import DeviceEvent
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundDone, RoundStarted, StepDone
from coordinator.results.history import RunHistory, scores
from edge_sdk.errors import printable

# Devices that have a bar and lines of their own; of a larger fleet it is said now and then, in
# seconds, how many do what.
MOST_DEVICES, FLEET_EVERY_S = 40, 10.0
# Scores in the line of a round.
MOST_SCORES = 12
# Steps over which a rate is taken: what the device does now, not what it did an hour ago.
RATE_STEPS = 20
# Widths of the columns that every bar has, and of those that follow where there is room for them.
NAME_WIDTH, LOSS_WIDTH, RATE_WIDTH, TRAFFIC_WIDTH = 14, 11, 11, 24
LEFT_WIDTH, BAR_WIDTH, MEMORY_WIDTH = 7, 12, 17


@dataclass
class _Device:
    task: TaskID | None
    ends: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_STEPS))
    """When its last steps ended, in seconds, and their tokens."""
    up: int = 0
    down: int = 0
    doing: str = ""


class Console:
    """Writes to the terminal what it sees. Use as a context manager."""

    def __init__(self, total_steps: int) -> None:
        self._out = RichConsole(file=sys.stderr, highlight=False)
        self._total_steps = total_steps
        self._devices: dict[str, _Device] = {}
        self._bars: Progress | None = None
        self._fleet_told_s = float("-inf")
        if sys.stderr.isatty():  # FORCE_COLOR, which rich asks as well, is set where logs are kept
            columns = _columns(self._out.width, total_steps)
            self._bars = Progress(*columns, console=self._out, refresh_per_second=4)

    def __enter__(self) -> Console:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Write a line, or several; nothing in it moves the cursor, whoever it came from."""
        clean = "\n".join(map(printable, text.split("\n")))
        self._out.print(clean, markup=False, soft_wrap=True)

    def see(self, event: RunEvent) -> None:
        """Move bars, and write what has a line."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, DeviceEvent):
            self._device(event)
        elif isinstance(event, RoundDone):
            self._row(event.row)
        elif event.text:
            if isinstance(event, RoundStarted):
                for device in event.waiting:
                    self._of(device).doing = "waiting for another round"
            self.note(event.text)

    def _device(self, event: DeviceEvent) -> None:
        """Say what a device is doing."""
        mine = self._of(event.device)
        mine.ends.clear()
        mine.doing = event.doing
        if self._is_fleet:
            self._tell_fleet()
            return
        self.note(event.text)
        words = event.doing if len(event.doing) <= LOSS_WIDTH else event.doing.split()[0]
        self._show(mine, loss=printable(words.rstrip(":,"))[:LOSS_WIDTH])

    def _step(self, event: StepDone) -> None:
        """Move the device's bar on."""
        device, report = event.device, event.report
        mine, done = self._of(device), report.stamp.step + 1
        mine.doing = "training"
        if event.traffic is not None:
            mine.up, mine.down = event.traffic
            up, down = map(_mb, event.traffic)
            self._show(mine, traffic=f"up {up:>6} down {down:>6} MB")
        mine.ends.append((time.monotonic(), report.num_tokens))
        rate = f"{_rate(mine.ends):5.0f} tok/s"
        loss, memory = f"loss {report.loss:6.3f}", f"{report.peak_bytes / 2**20:5.0f} MiB"
        if self._is_fleet:
            self._tell_fleet()
        if self._bars is None or mine.task is None:
            if done == event.end_step and not self._is_fleet:
                traffic = f"up {_mb(mine.up)}  down {_mb(mine.down)} MB"
                where = f"step {done}/{self._total_steps}"
                self.note(f"{device}: {where}  {loss}  {rate}  {traffic}  program {memory}")
            return
        self._show(mine, completed=done, loss=loss, rate=rate, memory=f"program {memory}")

    @property
    def _is_fleet(self) -> bool:
        """Whether there are more devices than anybody reads lines about."""
        return len(self._devices) > MOST_DEVICES

    def _tell_fleet(self) -> None:
        """Say how many devices do what, every FLEET_EVERY_S seconds."""
        now_s = time.monotonic()
        if now_s < self._fleet_told_s + FLEET_EVERY_S:
            return
        self._fleet_told_s = now_s
        doing = Counter(
            printable(one.doing).split(",")[0].split(":")[0] for one in self._devices.values()
        )
        told = ", ".join(f"{count:,} {what}" for what, count in doing.most_common(5))
        self.note(f"{len(self._devices):,} devices: {told}; `coordinator status RUN` lists them")

    def _row(self, row: Mapping[str, Any]) -> None:
        """Write one line for a round."""
        parts = [f"round {row['round']:>2}"]
        if "train_loss" in row:
            parts.append(f"train loss {row['train_loss']:.3f}")
        if found := scores(row):
            first = dict(list(found.items())[:MOST_SCORES])
            named = "  ".join(f"{name} {_score(score)}" for name, score in first.items())
            more = f"  and {len(found) - len(first):,} more" if len(found) > len(first) else ""
            parts.append(f"{_measure(found.values())}: {named}{more}")
            if counted := said(found.get("file", {})):
                parts.append(counted)
        if "lag" in row:
            parts.append(f"lag up to {row['lag']:.1%}")
        if len(parts) > 1:
            self.note("  ".join(parts))

    def _of(self, name: str) -> _Device:
        if name not in self._devices:
            task = None
            if self._bars is not None and len(self._devices) < MOST_DEVICES:
                empty: dict[str, Any] = dict.fromkeys(("loss", "rate", "traffic", "memory"), "")
                short = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "~"
                task = self._bars.add_task("", total=self._total_steps, name=short, **empty)
            self._devices[name] = _Device(task)
        return self._devices[name]

    def _show(self, mine: _Device, completed: int | None = None, **fields: Any) -> None:
        if self._bars is not None and mine.task is not None:
            self._bars.update(mine.task, completed=completed, **fields)


def _columns(width: int, total_steps: int) -> list[ProgressColumn]:
    """Return the columns of a bar that fit into *width*."""
    digits = len(str(total_steps))
    steps = f"{{task.completed:>{digits}.0f}}/{{task.total:.0f}}"
    columns: list[ProgressColumn] = [
        TextColumn("{task.fields[name]}", markup=False),
        TextColumn(steps, style="progress.percentage"),
        _fixed("loss", LOSS_WIDTH),
        _fixed("rate", RATE_WIDTH),
        _fixed("traffic", TRAFFIC_WIDTH),
    ]
    room = width - NAME_WIDTH - (2 * digits + 1) - LOSS_WIDTH - RATE_WIDTH - TRAFFIC_WIDTH - 4
    if room > LEFT_WIDTH:
        columns.append(TimeRemainingColumn(compact=True))
    if room > LEFT_WIDTH + BAR_WIDTH + 1:
        columns.insert(1, BarColumn(bar_width=BAR_WIDTH))
    if room > LEFT_WIDTH + BAR_WIDTH + MEMORY_WIDTH + 2:
        columns.append(_fixed("memory", MEMORY_WIDTH))
    return columns


def _fixed(name: str, width: int) -> TextColumn:
    column = Column(min_width=width, no_wrap=True)
    return TextColumn(f"{{task.fields[{name}]}}", markup=False, table_column=column)


def _rate(ends: deque[tuple[float, int]]) -> float:
    """Return the tokens a second since the first of the remembered steps."""
    if len(ends) < 2:
        return 0.0
    return sum(tokens for _, tokens in list(ends)[1:]) / max(1e-9, ends[-1][0] - ends[0][0])


def _measure(found: Iterable[Mapping[str, float]]) -> str:
    return "perplexity" if all("perplexity" in score for score in found) else "accuracy"


def _score(score: Mapping[str, float]) -> str:
    if "perplexity" in score:
        return f"{score['perplexity']:.2f}"
    return f"{score['accuracy']:.1%}"


def summary(history: RunHistory, most: int | None = MOST_DEVICES) -> Table:
    """Return a table of what a run has brought, device by device, *most* of them at most."""
    first, last = history.first_scores(), history.last_scores()
    measure = _measure(first.values()) if first else "score"
    table = Table(box=box.SIMPLE_HEAD)
    headings = ("validation data", f"{measure} before", "after")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    if "file" in first:
        table.add_row("file", _score(first["file"]), _score(last["file"]))
    names = sorted({*history.devices(), *last.keys()} - {"file"})
    for name in names[:most]:
        values = [_score(s[name]) if name in s else "-" for s in (first, last)]
        table.add_row(name, *values)
    if most is not None and (more := len(names) - most) > 0:
        table.add_row(f"and {more:,} more", "", "")
    return table


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f}"
