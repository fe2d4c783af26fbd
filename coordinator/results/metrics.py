"""What a run measures: one row of metrics a round, one of telemetry, and whoever watches.

`metrics.jsonl` holds only what the seed decides; times, bytes and memory go to `telemetry.jsonl`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from coordinator.gateway.interface import DeviceStats, Gateway
from coordinator.planning.joint import PlanSet
from coordinator.results.run_folder import RunFolder
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import EvalReport, StepReport
from edge_sdk.runtime.interface import TailSums


class Watcher(Protocol):
    """Somebody who looks on: a terminal, a test."""

    def note(self, text: str) -> None:
        """Something happened that a person should read."""

    def device(self, name: str, text: str) -> None:
        """A device joined, left, or changed what it is doing."""

    def begin_round(self) -> None:
        """Everybody is there, and training begins or goes on."""

    def step(self, device: str, report: StepReport, end_step: int) -> None:
        """A device finished a step of the round that ends at *end_step*."""

    def traffic(self, device: str, bytes_up: int, bytes_down: int) -> None:
        """A device has sent and received so many bytes in its session."""

    def row(self, row: dict[str, Any]) -> None:
        """A row of metrics is complete."""


class Silence:
    """A watcher who does nothing."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def device(self, name: str, text: str) -> None:
        """Ignore it."""

    def begin_round(self) -> None:
        """Ignore it."""

    def step(self, device: str, report: StepReport, end_step: int) -> None:
        """Ignore it."""

    def traffic(self, device: str, bytes_up: int, bytes_down: int) -> None:
        """Ignore it."""

    def row(self, row: dict[str, Any]) -> None:
        """Ignore it."""


@dataclass
class _Progress:
    """What a device has reported in the current round."""

    loss_sum: float = 0.0
    num_targets: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    peak_bytes: int = 0


@dataclass
class Reporting:
    """Collects reports and writes rows."""

    folder: RunFolder
    watcher: Watcher
    is_classifier: bool
    pending: dict[str, Any] | None = None
    """The row that still waits for the devices' evaluations."""
    _heard: set[str] = field(default_factory=set)
    """Devices that have evaluated for that row, those without validation data too."""
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.monotonic)

    def event(self, what: str, **details: Any) -> None:
        """Note what happened, with the clock time."""
        clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.folder.append("events.jsonl", {"time": clock, "event": what, **details})

    def begin_round(self) -> None:
        """Start the round's clock."""
        self._began_s = time.monotonic()
        self.watcher.begin_round()

    def progress(self) -> dict[str, dict[str, float]]:
        """What devices have reported in the current round, for a checkpoint."""
        return {name: asdict(mine) for name, mine in self._progress.items()}

    def load_progress(self, progress: Mapping[str, dict[str, Any]]) -> None:
        """Take over what `progress` returned; steps reported since then are run again."""
        self._progress = {name: _Progress(**mine) for name, mine in progress.items()}

    def step(
        self, device: str, report: StepReport, end_step: int, gateway: Gateway | None = None
    ) -> None:
        """Count a device's step; without a *gateway* there is no traffic."""
        mine = self._progress.setdefault(device, _Progress())
        mine.loss_sum += report.loss * report.num_targets
        mine.num_targets += report.num_targets
        mine.num_tokens += report.num_tokens
        mine.compute_s += report.compute_s
        mine.wait_s += report.wait_s
        mine.peak_bytes = max(mine.peak_bytes, report.peak_bytes)
        if traffic := _traffic(_stats(gateway, device)):
            self.watcher.traffic(device, **traffic)
        self.watcher.step(device, report, end_step)

    def end_round(
        self, round_: int, step: int, facts: dict[str, Any], evaluated: TailSums | None
    ) -> None:
        """Open the row of a round; *evaluated* is the result on the coordinator's own file.

        Row 0 is what was there before training, row n what n rounds have made.
        """
        self.flush()
        row: dict[str, Any] = {"round": round_, "step": step, **facts}
        if self._progress:
            ordered = [self._progress[name] for name in sorted(self._progress)]
            targets = sum(p.num_targets for p in ordered)
            row["train_loss"] = sum(p.loss_sum for p in ordered) / max(1, targets)
            row["train_loss_by_device"] = {
                n: p.loss_sum / max(1, p.num_targets) for n, p in sorted(self._progress.items())
            }
        if evaluated is not None:
            row["eval"] = self._score(*evaluated)
        self.pending, self._heard, self._progress = row, set(), {}

    def _score(self, loss_sum: float, num_targets: int, num_correct: int) -> dict[str, float]:
        loss = loss_sum / max(1, num_targets)
        score: dict[str, float] = {"loss": loss, "targets": num_targets}
        score["accuracy"] = num_correct / max(1, num_targets)
        if not self.is_classifier:
            score["perplexity"] = math.exp(min(loss, 700.0))
        return score

    def planned(
        self, round_: int, found: PlanSet, reasons: Sequence[str], importance: Mapping[str, float]
    ) -> None:
        """Keep what everybody is to run from round *round_* on, and why, in plans.jsonl."""
        plans = {d: {"split": p.split, "ranks": p.ranks} for d, p in found.plans.items()}
        row = {
            "round": round_,
            "reasons": list(reasons),
            "plans": plans,
            "server_ranks": found.server_ranks,
            "wave_s": found.wave_s,
            "utility": found.utility,
            "refused": found.refused,
            "importance": dict(importance),
        }
        self.folder.append("plans.jsonl", row)
        for reason in reasons:
            self.watcher.note(f"plans from round {round_} on: {reason}")

    def evaluation(self, device: str, report: EvalReport) -> None:
        """A device went through its private validation data."""
        self._heard.add(device)
        if self.pending is not None and report.num_targets:
            scores = self.pending.setdefault("eval_by_device", {})
            scores[device] = self._score(report.loss_sum, report.num_targets, report.num_correct)

    def flush_if_complete(self, members: Collection[str]) -> None:
        """Write the row that was waiting once everybody of the round has evaluated."""
        scores = {} if self.pending is None else self.pending.get("eval_by_device", {})
        if members and self._heard | scores.keys() >= set(members):
            self.flush()

    def flush(self) -> None:
        """Write the row that was waiting."""
        if self.pending is None:
            return
        row, self.pending = self.pending, None
        if "eval_by_device" in row:
            row["eval_by_device"] = dict(sorted(row["eval_by_device"].items()))
        self.folder.append("metrics.jsonl", row)
        self.watcher.row(row)

    def telemetry(self, round_: int, gateway: Gateway | None = None) -> None:
        """Write what the round cost; without a *gateway* there is no traffic."""
        devices = {}
        for name, progress in sorted(self._progress.items()):
            devices[name] = {
                "tokens": progress.num_tokens,
                "compute_s": round(progress.compute_s, 3),
                "wait_s": round(progress.wait_s, 3),
                "peak_bytes": progress.peak_bytes,
                **_traffic(_stats(gateway, name)),
                **_board(_stats(gateway, name)),
            }
        seconds = time.monotonic() - self._began_s
        self.folder.append(
            "telemetry.jsonl",
            {"round": round_, "seconds": round(seconds, 3), "devices": devices},
        )


def _traffic(stats: DeviceStats | None) -> dict[str, int]:
    return {"bytes_up": stats.bytes_up, "bytes_down": stats.bytes_down} if stats else {}


def _board(stats: DeviceStats | None) -> dict[str, Any]:
    """Return what the board said of itself with its last sign of life."""
    return {"board": stats.telemetry} if stats and stats.telemetry else {}


def _stats(gateway: Gateway | None, device: str) -> DeviceStats | None:
    try:
        return gateway.stats(device) if gateway else None
    except PeerGone:
        return None
