"""A run as a person at a terminal sees it: bars where there is a terminal, lines where not."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from coordinator.store import RunFolder
from edge_sdk.messages import StepReport


@dataclass
class _Device:
    task: TaskID | None
    first_step: int = -1
    began_s: float = 0.0
    tokens: int = 0


class Console:
    """A `Watcher` that writes to the terminal. Use as a context manager."""

    def __init__(self, total_steps: int) -> None:
        self._out = RichConsole(file=sys.stderr, highlight=False)
        self._total_steps = total_steps
        self._devices: dict[str, _Device] = {}
        self._bars: Progress | None = None
        if self._out.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[name]:<14}"),
                BarColumn(bar_width=28),
                TextColumn("step {task.completed:>4.0f}/{task.total:.0f}"),
                TextColumn("{task.description}"),
                console=self._out,
            )

    def __enter__(self) -> Console:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Write a line."""
        self._out.print(text, markup=False, soft_wrap=True)

    def device(self, name: str, text: str) -> None:
        """Say what a device is doing."""
        self._of(name)
        if self._bars is None or "left" in text:
            self.note(f"{name}: {text}")
        self._describe(name, text)

    def step(self, device: str, report: StepReport, end_step: int) -> None:
        """Move the device's bar on."""
        mine = self._of(device)
        now_s = time.monotonic()
        if mine.first_step < 0:
            mine.first_step, mine.began_s = report.stamp.step, now_s
        mine.tokens += report.num_tokens
        rate = mine.tokens / max(1e-9, now_s - mine.began_s) if now_s > mine.began_s else 0.0
        mib = report.peak_rss_bytes / 2**20
        text = f"loss {report.loss:7.3f}  {rate:7.0f} tok/s  {mib:5.0f} MiB"
        if self._bars is not None and mine.task is not None:
            self._bars.update(mine.task, completed=report.stamp.step, description=text)
        elif report.stamp.step == end_step:
            self.note(f"{device}: step {report.stamp.step}/{self._total_steps}  {text}")

    def row(self, row: dict[str, Any]) -> None:
        """Write one line for a round."""
        parts = [f"[round {row['round']}]"]
        if "train_loss" in row:
            parts.append(f"train loss {row['train_loss']:.3f}")
        if "eval" in row:
            parts.append(f"eval {_score(row['eval'])}")
        for name, score in row.get("eval_by_device", {}).items():
            parts.append(f"{name} {_score(score)}")
        self.note("  ".join(parts))

    def _of(self, name: str) -> _Device:
        if name not in self._devices:
            task = None
            if self._bars is not None:
                task = self._bars.add_task("", total=self._total_steps, name=name)
            self._devices[name] = _Device(task)
        return self._devices[name]

    def _describe(self, name: str, text: str) -> None:
        task = self._devices[name].task
        if self._bars is not None and task is not None:
            self._bars.update(task, description=text)


def _score(score: dict[str, float]) -> str:
    if "perplexity" in score:
        return f"perplexity {score['perplexity']:.2f}"
    return f"accuracy {score['accuracy']:.1%}"


def summary(folder: RunFolder) -> Table:
    """What a run cost and what it brought, device by device."""
    rows, costs = folder.rows("metrics.jsonl"), folder.rows("telemetry.jsonl")
    table = Table(title=f"Run {folder.name}")
    for heading in ("device", "before", "after", "up MiB", "down MiB", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    if rows and "eval" in rows[0] and "eval" in rows[-1]:
        table.add_row("(file)", _score(rows[0]["eval"]), _score(rows[-1]["eval"]), "", "", "")
    last = costs[-1]["devices"] if costs else {}
    for name in sorted(last):
        first_score = rows[0].get("eval_by_device", {}).get(name) if rows else None
        last_score = rows[-1].get("eval_by_device", {}).get(name) if rows else None
        peak = max(c["devices"].get(name, {}).get("peak_rss_bytes", 0) for c in costs)
        table.add_row(
            name,
            _score(first_score) if first_score else "-",
            _score(last_score) if last_score else "-",
            _mib(last[name].get("bytes_up")),
            _mib(last[name].get("bytes_down")),
            _mib(peak),
        )
    return table


def _mib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.1f}"
