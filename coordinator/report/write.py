"""Write a run's report: one HTML file that needs nothing else. `report.html` is its template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.report.decided import decided, troubles
from coordinator.report.learned import learned
from coordinator.report.parts import Section, text_of
from coordinator.report.run_sums import RunSums
from coordinator.report.template import render
from coordinator.report.work import boards, traffic, work
from coordinator.results.history import overall
from coordinator.results.run_folder import CLOCK, CONFIG, RunFolder
from edge_sdk.duration import duration
from edge_sdk.files import atomic_write, storage_errors

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name(REPORT)
_OUTCOMES = {
    "completed": "complete",
    "stopped": "stopped by its operator, with a result",
    "paused": "paused; it can go on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """What the template shows."""

    name: str
    state: str
    facts: list[str]
    """How it was trained, a sentence each."""
    tiles: list[tuple[str, str]]
    """The numbers that are looked for first, and what they are."""
    sections: list[Section]
    config: str


def write_report(folder: RunFolder, config: ServeConfig, out: Path | None = None) -> Path:
    """Write the report of the run in *folder* to *out*, or beside its files; return where it is.

    Raises:
        StorageError: a file cannot be read or written.
        ConfigError: jinja2 is missing.
    """
    path = folder.path / REPORT if out is None else out
    facts = RunSums(folder, config)
    with storage_errors(folder.path / CONFIG):
        text = (folder.path / CONFIG).read_text("utf-8")
    page = ReportPage(
        name=folder.name,
        state=_state(facts),
        facts=_facts(facts),
        tiles=_tiles(facts),
        sections=[
            learned(facts),
            work(facts),
            decided(facts),
            traffic(facts),
            boards(facts),
            troubles(facts),
        ],
        config=text,
    )
    atomic_write(path, render(TEMPLATE, page), what="the report")
    return path


def _state(facts: RunSums) -> str:
    """Return how the run ended, and when."""
    events = facts.history.events
    outcomes = [r for r in events if r["event"] in ("run.started", "run.ended")]
    if not outcomes:
        return "it has not begun"
    last = outcomes[-1]
    if last["event"] == "run.started":
        return f"goes on, or ended without a word; begun {_clock(events[0]['time'])}"
    began, ended = _clock(events[0]["time"]), _clock(last["time"])
    said = _OUTCOMES.get(last["outcome"], last["outcome"])
    return f"{said}; from {began} to {ended}"


def _clock(time: str) -> str:
    return datetime.strptime(time, CLOCK).strftime("%Y-%m-%d %H:%M:%S %Z")


def _facts(facts: RunSums) -> list[str]:
    config, done = facts.config, facts.history.rounds_done
    model = Path(config.model).name
    lora = config.lora.r
    pooled = config.trained_by == "coordinator"
    method = f"method {config.preset}, " if config.preset else ""
    count = len(facts.devices)
    devices = "1 device" if count == 1 else f"{count} devices"
    who = "the coordinator alone" if pooled else devices
    training = config.training
    found = [
        f"Model {model}, {config.task}, trained by {who}: {method}{done} of {config.rounds} rounds "
        f"of {config.steps_per_round} steps.",
        f"LoRA of rank {lora}, {training.optimizer} with a peak rate of {training.learning_rate:g} "
        f"({training.lr_scheduler_type}), seed {training.seed}; aggregation {config.aggregation}; "
        f"labels on the {config.labels}.",
    ]
    if facts.is_modelled:
        found.append("Devices were simulated: time is modelled, and all share one process.")
    try:
        about: Any = json.loads((facts.folder.path / "env.json").read_bytes())
        named = [f"{name} {about[name]}" for name in ("edgesplit", "torch", "python")]
        found.append(f"On {', '.join(named)}.")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return found


def _tiles(facts: RunSums) -> list[tuple[str, str]]:
    """Return the numbers that are looked for first."""
    scores = [score for row in facts.metrics if (score := overall(row)) is not None]
    tiles = []
    if scores:
        first, last = scores[0], scores[-1]
        losses = f"{text_of(first.loss, '.3f')} to {text_of(last.loss, '.3f')}"
        tiles.append((losses, "loss on validation data"))
        tiles.append((text_of(last.accuracy, ".1%"), "right predictions there"))
    samples = max(facts.history.samples().values(), default=0)
    tiles.append((text_of(samples), "samples trained on"))
    seconds = max(facts.seconds_at().values(), default=0.0)
    what = "of modelled time" if facts.is_modelled else "in rounds"
    tiles.append((duration(seconds), what))
    total = max(facts.bytes_at.values(), default=0)
    tiles.append((f"{total / 1e6:,.1f} MB", "sent by and to devices"))
    joules = [own.joules for own in facts.devices.values() if own.joules is not None]
    if joules:
        kind = "modelled energy" if facts.is_modelled else "energy"
        tiles.append((f"{sum(joules):,.0f} J", f"{kind} of {len(joules)} boards"))
    return tiles
