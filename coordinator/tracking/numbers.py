"""What happened in a run, as numbers over steps. Knows no tracker."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.config.scoring import SCORES
from coordinator.planning.plan_set import PlanSet
from coordinator.results.events.devices import (
    DeviceJoined,
    DeviceLeft,
    DeviceStatus,
    MessageRejected,
)
from coordinator.results.events.event import RunEvent
from coordinator.results.events.plans import PlanMade, PlanShrunk
from coordinator.results.events.rounds import (
    DevicesMissing,
    RoundDone,
    RoundStarted,
    StepDone,
    Telemetry,
    UploadRefused,
    Waiting,
    WaitingOver,
)
from coordinator.results.events.steering import TestEvaluated
from coordinator.results.history import RunHistory, overall, scores
from coordinator.tracking.names import Moment, Number
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training import learning_rate

# Where the name of a board's reading differs from that of its number.
_BOARD = {
    "temperature": "board/temperature_celsius",
    "power": "board/power_watts",
    "energy": "board/energy_joules",
}
# Why a device leaves whose owner wants it to.
_BY_WILL = ("stopped", "completed")
# Everything else that happens has no number.
COUNTED = (
    DeviceJoined,
    DeviceLeft,
    DevicesMissing,
    DeviceStatus,
    MessageRejected,
    PlanMade,
    PlanShrunk,
    RoundDone,
    RoundStarted,
    StepDone,
    Telemetry,
    TestEvaluated,
    UploadRefused,
    Waiting,
    WaitingOver,
)


@dataclass(frozen=True, slots=True)
class SoFar:
    """What a run that goes on has counted before."""

    tokens: int = 0
    samples: int = 0
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes up and down, by device."""
    costs: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The row of telemetry.jsonl whose round has no complete row of metrics yet, by rounds done."""


def so_far(history: RunHistory) -> SoFar:
    """Return what the run of *history* has counted."""
    names, last = history.devices(), history.costs[-1:]
    costs = {row["round"] + 1: row for row in last if row["round"] + 1 > history.rounds_done}
    summed = {name: history.cost(name) for name in names}
    return SoFar(
        tokens=sum(cost.tokens for cost in summed.values()),
        samples=max(history.samples().values(), default=0),
        traffic={name: (cost.bytes_up, cost.bytes_down) for name, cost in summed.items()},
        costs=costs,
    )


@dataclass
class _Device:
    traffic: tuple[int, int] = (0, 0)
    """Bytes up and down in the whole run, as events say them."""
    plan: tuple[Number, ...] = ()
    troubles: int = 0


class Numbers:
    """Turns events into samples; keeps what has to be summed up."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._devices: dict[str, _Device] = {}
        self._tokens = self._samples = self._step = 0
        self._costs: dict[int, Mapping[str, Any]] = {}
        """What rounds cost whose row of metrics is not complete yet, by rounds done."""
        self._waiting: set[str] = set()

    def _go_on(self, before: SoFar) -> None:
        """Count on from what was there before."""
        self._tokens, self._samples = before.tokens, before.samples
        self._costs = dict(before.costs)
        for name, traffic in before.traffic.items():
            self._devices[name] = _Device(traffic)

    def of(self, event: RunEvent | SoFar, time_s: float | None = None) -> list[Moment]:
        """Return what *event* says in numbers; *time_s* is when it happened, None: now.

        What was there before a run went on is counted on from.
        """
        now_s = time.time() if time_s is None else time_s
        match event:
            case SoFar():
                self._go_on(event)
                return []
            case StepDone():
                return list(self._of_step(event, now_s))
            case RoundDone():
                return [self._of_round(event, now_s)]
            case Telemetry():
                self._take_costs(event)
                return []
            case TestEvaluated(score=score):
                tested = tuple(_scores(score, None, "test"))
                return [Moment("test", self._step, now_s, tested)]
        found = list(self._of_moment(event))
        return [Moment("", self._step, now_s, tuple(found), is_live=True)] if found else []

    def _of(self, device: str) -> _Device:
        return self._devices.setdefault(device, _Device())

    # ---- steps ----

    def _of_step(self, event: StepDone, now_s: float) -> Iterator[Moment]:
        report, device = event.report, event.device
        done, took_s = report.stamp.step + 1, report.compute_s + report.wait_s
        self._step = max(self._step, done)
        source = f"device/{device}"
        first = [Number("train/loss", report.loss, device)]
        if took_s > 0:
            rate = report.num_tokens / took_s
            first.append(Number("train/tokens_per_second", rate, device))
        yield Moment(source, done, now_s, tuple(first))
        if event.traffic is not None:
            self._of(device).traffic = event.traffic
        rest = {
            "train/global_step": done,
            "train/compute_seconds": report.compute_s,
            "train/wait_seconds": report.wait_s,
            "memory/program_peak_bytes": report.peak_bytes,
        }
        numbers = [Number(name, value, device) for name, value in rest.items()]
        numbers += [*self._traffic(device), *_board(device, event.board)]
        # As a curve, once a round is enough of what changes slowly.
        is_last = done == event.end_step
        yield Moment(f"{source}/rest", done, now_s, tuple(numbers), is_live=not is_last)
        step = (Number("train/global_step", self._step),)
        yield Moment("", self._step, now_s, step, is_live=True)

    def _traffic(self, device: str) -> Iterator[Number]:
        up, down = self._of(device).traffic
        yield Number("traffic/up_bytes", up, device)
        yield Number("traffic/down_bytes", down, device)

    # ---- rounds ----

    def _take_costs(self, event: Telemetry) -> None:
        self._costs[event.round + 1] = {"seconds": event.seconds, "devices": event.devices}
        for device, cost in event.devices.items():
            self._tokens += cost["tokens"]
            if "bytes_up" in cost:
                self._of(device).traffic = cost["bytes_up"], cost["bytes_down"]

    def _of_round(self, event: RoundDone, now_s: float) -> Moment:
        row, done = event.row, event.row["round"]
        self._samples += row.get("samples", 0)
        self._step = max(self._step, row["step"])
        cost = self._costs.pop(done, None)
        numbers = [*self._run_numbers(row), *self._of_cost(cost)]
        for device, score in scores(row).items():
            if device != "file":
                numbers += _scores(score, device)
        for mine in self._devices.values():
            numbers += mine.plan
        return Moment("round", row["step"], now_s, tuple(numbers))

    def _run_numbers(self, row: Mapping[str, Any]) -> Iterator[Number]:
        config, step = self._config, row["step"]
        yield Number("train/global_step", step)
        yield Number("train/round", row["round"])
        yield Number("train/num_input_tokens_seen", self._tokens)
        yield Number("train/samples", self._samples)
        for name, key in (("loss", "train_loss"), ("update_rank", "rank"), ("lag", "lag")):
            if row.get(key) is not None:
                yield Number(f"train/{name}", row[key])
        if config.round_mode == "synchronous":  # else each device counts steps of its own
            last = max(0, step - 1)
            rate = learning_rate(config.training, last, config.total_steps)
            yield Number("train/learning_rate", rate)
        if (found := overall(row)) is not None:
            own = scores(row).get("file") or found._asdict()
            if "perplexity" not in own and not config.label_names:
                own = {**own, "perplexity": _perplexity(own["loss"])}
            yield from _scores(own, None)

    def _of_cost(self, cost: Mapping[str, Any] | None) -> Iterator[Number]:
        if cost is not None:
            yield Number("round/seconds", cost["seconds"])
            yield Number("round/devices", len(cost["devices"]))
        traffic = [device.traffic for device in self._devices.values()]
        yield Number("traffic/up_bytes", sum(up for up, _ in traffic))
        yield Number("traffic/down_bytes", sum(down for _, down in traffic))

    # ---- what else there is to know at the moment ----

    def _of_moment(self, event: RunEvent) -> Iterator[Number]:
        match event:
            case PlanMade(plans=PlanSet(plans=plans)) | PlanShrunk(plans=plans):
                for device, plan in plans.items():
                    yield from self._take_plan(device, plan)
            case DeviceJoined(device, split) if not self._of(device).plan:
                self._of(device).plan = (Number("plan/blocks", split, device),)
                yield from self._of(device).plan
            case RoundStarted(devices=devices):
                self._waiting = set()
                yield Number("round/devices", len(devices))
                yield Number("run/waiting", 0)
            case Waiting(devices=devices):
                self._waiting |= set(devices)
                yield Number("run/waiting", len(self._waiting))
            case WaitingOver(device=device):
                self._waiting.discard(device)
                yield Number("run/waiting", len(self._waiting))
            case DevicesMissing(ready=ready, least=least):
                yield Number("run/waiting", least - len(ready))
        if (whose := _in_trouble(event)) is not None:
            self._of(whose).troubles += 1
            yield Number("run/troubles", self._of(whose).troubles, whose)

    def _take_plan(self, device: str, plan: Plan) -> tuple[Number, ...]:
        ranks = [fmean(plan.ranks.values())] if plan.ranks else []
        blocks = Number("plan/blocks", plan.split, device)
        self._of(device).plan = (blocks, *(Number("plan/mean_rank", r, device) for r in ranks))
        return self._of(device).plan


def _in_trouble(event: RunEvent) -> str | None:
    """Return the device with which something has gone wrong."""
    match event:
        case DeviceLeft(device, reason) if reason not in _BY_WILL:
            return device
        case DeviceStatus(device, is_delay=True) | MessageRejected(device):
            return device
        case UploadRefused(device=device):
            return device
    return None


def _board(device: str, board: Mapping[str, float]) -> Iterator[Number]:
    for key, name in _BOARD.items():
        if key in board:
            yield Number(name, board[key], device)
    if "memory_total" in board and "memory_available" in board:
        taken = board["memory_total"] - board["memory_available"]
        yield Number("board/memory_used_bytes", taken, device)


def _scores(score: Mapping[str, float], device: str | None, what: str = "eval") -> Iterator[Number]:
    for key in ("loss", "accuracy", "perplexity", *SCORES):
        if key in score:
            yield Number(f"{what}/{key}", score[key], device)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if not math.isnan(loss) else math.nan
