"""What a run measures: one row of metrics a round, one of telemetry.

A row of metrics holds only what the seed decides; times, bytes and memory are telemetry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from coordinator.gateway.interface import DeviceStats, Gateway
from coordinator.results.events.event import Watcher
from coordinator.results.events.rounds import RoundDone, StepDone, Telemetry
from coordinator.results.session_counters import DOWN, UP, SessionCounters
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import EvalReport, StepReport
from edge_sdk.runtime.interface import TailSums

NOTHING_LATE: Mapping[str, int] = MappingProxyType({})
NO_SCORES: Mapping[str, float] = MappingProxyType({})


@dataclass
class _Progress:
    """What a device has reported in the current round."""

    loss_sum: float = 0.0
    num_targets: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    peak_bytes: int = 0


def _read_progress(facts: Mapping[str, Any]) -> _Progress:
    """Return what a checkpoint holds; what was no number stands there as null."""
    numbers: dict[str, Any] = {key: math.nan if v is None else v for key, v in facts.items()}
    return _Progress(**numbers)


def score_of(sums: TailSums, *, is_classifier: bool) -> dict[str, float]:
    """Return loss, accuracy and, of a language model, perplexity over all targets."""
    loss_sum, num_targets, num_correct = sums
    loss = loss_sum / max(1, num_targets)
    score: dict[str, float] = {"loss": loss, "targets": num_targets}
    score["accuracy"] = num_correct / max(1, num_targets)
    if not is_classifier:
        score["perplexity"] = math.exp(min(loss, 700.0))
    return score


def _counts(stats: DeviceStats) -> dict[str, int]:
    """Return all counters of a session."""
    return {UP: stats.bytes_up, DOWN: stats.bytes_down, **stats.traffic}


@dataclass
class Reporting:
    """Collects reports and tells the watcher of each complete row."""

    watcher: Watcher
    is_classifier: bool
    gateway: Gateway | None = None
    """Knows traffic and boards; None where there are no devices."""
    pending: dict[str, Any] | None = None
    """The row that still waits for the devices' evaluations."""
    _heard: set[str] = field(default_factory=set)
    """Devices that have evaluated for that row, also those without validation data."""
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.monotonic)
    _carried_s: float = 0.0
    """What the round had taken before the coordinator was started again."""
    _counters: SessionCounters[int] = field(default_factory=SessionCounters)

    def begin_round(self) -> None:
        """Start the round's clock, or let it go on."""
        self._began_s, self._carried_s = time.monotonic() - self._carried_s, 0.0

    def costs(self) -> dict[str, Any]:
        """Return what the round and the run have cost by now, for a checkpoint."""
        elapsed_s = time.monotonic() - self._began_s if self._progress else 0.0
        for device in [] if self.gateway is None else self.gateway.devices():
            if (stats := self._stats(device)) is not None:
                self._sums(device, stats)
        return {"elapsed_s": elapsed_s, "counters": self._counters.facts()}

    def load_costs(self, costs: Mapping[str, Any]) -> None:
        """Go on from what `costs` returned in a process that is no more."""
        self._carried_s = costs.get("elapsed_s") or 0.0
        self._counters.load(costs.get("counters", {}))

    def progress(self) -> dict[str, dict[str, float]]:
        """Return what devices have reported in the current round, for a checkpoint."""
        return {name: asdict(mine) for name, mine in self._progress.items()}

    def load_progress(self, progress: Mapping[str, dict[str, Any]]) -> None:
        """Take over what `progress` returned; steps reported since then are run again."""
        self._progress = {name: _read_progress(mine) for name, mine in progress.items()}

    def restore_row(self, row: dict[str, Any] | None) -> None:
        """Wait again for the evaluations that *row* still lacks; None: there is no such row."""
        self.pending, self._heard = row, set()

    def step(self, device: str, report: StepReport, end_step: int) -> None:
        """Count a device's step."""
        mine = self._progress.setdefault(device, _Progress())
        mine.loss_sum += report.loss * report.num_targets
        mine.num_targets += report.num_targets
        mine.num_tokens += report.num_tokens
        mine.compute_s += report.compute_s
        mine.wait_s += report.wait_s
        mine.peak_bytes = max(mine.peak_bytes, report.peak_bytes)
        stats = self._stats(device)
        found = None if stats is None else self._sums(device, stats)
        traffic = None if found is None else (found[UP], found[DOWN])
        board = {} if stats is None else stats.telemetry
        self.watcher.see(StepDone(device, report, end_step, traffic, board))

    def end_round(
        self,
        round_: int,
        step: int,
        facts: dict[str, Any],
        evaluated: TailSums | None,
        scores: Mapping[str, float] = NO_SCORES,
    ) -> None:
        """Open the row of a round; row 0 is what was there before training.

        Args:
            round_: Rounds that are done.
            step: Optimizer steps that are done.
            facts: What else the row holds.
            evaluated: What the coordinator's own file gave.
            scores: The scores of `evaluation.scores` there.
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
            row["eval"] = {**self.score(evaluated), **scores}
        self.pending, self._heard, self._progress = row, set(), {}

    def score(self, sums: TailSums) -> dict[str, float]:
        """Return loss, accuracy and, of a language model, perplexity over all targets."""
        return score_of(sums, is_classifier=self.is_classifier)

    def evaluation(self, device: str, report: EvalReport) -> None:
        """Take in what a device found on its private validation data."""
        self._heard.add(device)
        if self.pending is not None and report.num_targets:
            scores = self.pending.setdefault("eval_by_device", {})
            sums = TailSums(report.loss_sum, report.num_targets, report.num_correct)
            scores[device] = self.score(sums)

    def flush_if_complete(self, members: Collection[str]) -> None:
        """Complete the row that was waiting once everybody of the round has evaluated."""
        scores = {} if self.pending is None else self.pending.get("eval_by_device", {})
        if members and self._heard | scores.keys() >= set(members):
            self.flush()

    def flush(self) -> None:
        """Complete the row that was waiting."""
        if self.pending is None:
            return
        row, self.pending = self.pending, None
        if "eval_by_device" in row:
            row["eval_by_device"] = dict(sorted(row["eval_by_device"].items()))
        self.watcher.see(RoundDone(row, self.boards()))

    def telemetry(self, round_: int, late: Mapping[str, int] = NOTHING_LATE) -> None:
        """Tell what the round cost, and how many messages of earlier ones came *late* in it."""
        devices = {}
        for name, progress in sorted(self._progress.items()):
            stats = self._stats(name)
            board = {} if stats is None else stats.telemetry
            kinds = {} if stats is None else self._sums(name, stats)
            ways = {way: kinds.pop(way) for way in (UP, DOWN) if way in kinds}
            devices[name] = {
                "tokens": progress.num_tokens,
                "compute_s": round(progress.compute_s, 3),
                "wait_s": round(progress.wait_s, 3),
                "peak_bytes": progress.peak_bytes,
                **ways,
                **({"traffic": kinds} if kinds else {}),
                **({"board": board} if board else {}),
            }
        self.watcher.see(Telemetry(round_, time.monotonic() - self._began_s, devices, late))

    def boards(self) -> dict[str, Mapping[str, Any]]:
        """Return what each board said of itself with its last sign of life, by device."""
        names = [] if self.gateway is None else self.gateway.devices()
        return {name: board for name in names if (board := self._telemetry_of(name))}

    def _telemetry_of(self, device: str) -> Mapping[str, Any]:
        stats = self._stats(device)
        return {} if stats is None else stats.telemetry

    def _sums(self, device: str, stats: DeviceStats) -> dict[str, int]:
        """Return bytes up, down and by kind over all sessions in the run."""
        return self._counters.take(device, _counts(stats), stats.session)

    def _stats(self, device: str) -> DeviceStats | None:
        """Return what is known of the connection of *device*; None without one."""
        try:
            return None if self.gateway is None else self.gateway.stats(device)
        except PeerGone:
            return None
