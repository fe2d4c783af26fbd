"""Who looks on while a run goes on: files, a terminal, a laboratory. They can change nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

from coordinator.results.events.devices import (
    DeviceEnrolled,
    DeviceJoined,
    DeviceLeft,
    DeviceStatus,
    MessageRejected,
)
from coordinator.results.events.event import RunEvent, Watcher
from coordinator.results.events.plans import ImportanceMeasured, PlanMade, PlanShrunk
from coordinator.results.events.reporting import ReportFailed, TrackerLeftOut
from coordinator.results.events.rounds import (
    DevicesCutOff,
    DevicesMissing,
    RoundDone,
    RoundHeld,
    RoundSaved,
    RoundStarted,
    RoundUnsaved,
    RunRewound,
    StepDone,
    StepSkipped,
    Telemetry,
    UploadRefused,
    Waiting,
    WaitingOver,
    WorkDropped,
)
from coordinator.results.events.run import (
    CheckpointDamaged,
    Exported,
    RunFinished,
    RunStarted,
    StopAsked,
)
from coordinator.results.events.steering import BestChosen, EndedEarly, SampleText, TestEvaluated
from coordinator.results.events.tours import ToursMerged
from coordinator.results.plan_rows import packed
from coordinator.results.result_files import hashes
from coordinator.results.run_folder import CLOCK, SAMPLES, RunFolder
from coordinator.results.standing.observed import Computed, DeviceOffer, ModelKnown


@runtime_checkable
class LoopWatcher(Protocol):
    """Who wants to know that the event loop turns, whether anything happens or not."""

    def turn(self) -> None:
        """Take notice; called at least every second, in the run's own thread."""


class Watchers:
    """Several watchers as one; none at all is a watcher who ignores everything.

    Each sees an event before the next one does. What a watcher raises is not caught: it ends the
    run as an error of the run itself would, and later watchers do not see that event. The run's
    files come first, so that what they hold is whole.
    """

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        self._watchers = tuple(watchers)
        # Asked once: to look for the method takes longer than most calls of it.
        self._turning = [watcher for watcher in watchers if isinstance(watcher, LoopWatcher)]
        self.failure: Exception | None = None
        """What a watcher has raised: no device is the reason, whatever it was shown."""

    def see(self, event: RunEvent) -> None:
        """Show *event* to everybody, in order."""
        try:
            for watcher in self._watchers:
                watcher.see(event)
        except Exception as error:
            self.failure = error
            raise

    def turn(self) -> None:
        """Let those know who want to that the event loop turns."""
        for watcher in self._turning:
            watcher.turn()


# Of each there is one for every step of a device: they stand in no file, and are known at once.
_UNWRITTEN = (StepDone, Computed)


class RunFiles:
    """Writes events, metrics, telemetry and plans into the folder of a run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def see(self, event: RunEvent) -> None:
        """Append the line of *event*, where it has one.

        Raises:
            StorageError: it cannot be written.
        """
        if isinstance(event, _UNWRITTEN):
            return
        match event:
            case RoundDone(row):
                self._folder.append("metrics.jsonl", row)
            case SampleText(round_, prompt, completion):
                row = {"round": round_, "prompt": prompt, "text": completion}
                self._folder.append(SAMPLES, row)
            case Telemetry(round_, seconds, devices, late):
                row = {"round": round_, "seconds": round(seconds, 3), "devices": devices}
                if late:
                    row["late"] = late
                self._folder.append("telemetry.jsonl", row)
            case PlanMade():
                self._folder.append("plans.jsonl", _plan_row(event))
                self._happened(_explained_row(event))
            case PlanShrunk():
                self._folder.append("plans.jsonl", _shrunk_row(event))
            case ImportanceMeasured(round_, importance):
                numbers = {name: float(f"{value:.4g}") for name, value in importance.items()}
                row = {"round": round_, "importance": numbers}
                self._folder.append("importance.jsonl", row)
            case _ if (line := _event_row(event)) is not None:
                self._happened(line)
                if isinstance(event, Exported):
                    self._folder.settle()

    def _happened(self, line: Mapping[str, Any]) -> None:
        self._folder.append("events.jsonl", {"time": time.strftime(CLOCK), **line})


def _event_row(event: RunEvent) -> Mapping[str, Any] | None:
    """Return the line of events.jsonl, less its time; None for what does not stand there."""
    match event:
        case RunStarted(run, step):
            return {"event": "run.started", "run": run, "step": step}
        case ModelKnown(num_blocks):
            return {"event": "model", "blocks": num_blocks}
        case RunFinished(outcome):
            return {"event": "run.ended", "outcome": outcome}
        case StopAsked(kind, after_round):
            return {"event": "stop.asked", "wish": kind, "after_round": after_round}
        case Exported(what, difference, path):
            files = {} if path is None or not path.is_dir() else {"files": hashes(path)}
            return {"event": f"{what}.exported", "difference": difference, **files}
        case CheckpointDamaged(checkpoint, reason, aside):
            row = {"checkpoint": checkpoint, "reason": reason, "aside": aside}
            return {"event": "checkpoint.damaged", **row}
        case RoundStarted(round_, attempt, devices, waiting=waiting):
            began = {"event": "round.started", "round": round_, "attempt": attempt}
            drawn = {"drawn_from": len(devices) + len(waiting)} if waiting else {}
            return {**began, "devices": list(devices), **drawn}
        case ToursMerged(version, updates, standing, dropped):
            on_tour = {n: {"version": v, "staleness": age} for n, (v, age) in standing.items()}
            merged: dict[str, Any] = {"event": "tours.merged", "version": version}
            merged |= {"updates": dict(updates), "on_tour": on_tour}
            return merged | ({"dropped": dropped} if dropped else {})
        case StepSkipped(step):
            return {"event": "step.skipped", "step": step, "reason": "gradient not finite"}
        case DeviceJoined(device, split, samples, left_out, cut):
            lost = {"left_out": left_out, "cut": cut} if left_out or cut else {}
            rows = {"split": split, "samples": samples, **lost}
            return {"event": "device.joined", "device": device, **rows}
        case DeviceEnrolled(device, key, address):
            row = {"device": device, "fingerprint": key, "address": address}
            return {"event": "device.enrolled", **row}
        case DeviceLeft(device, reason):
            return {"event": "device.left", "device": device, "reason": reason}
        case DeviceOffer(device, _, profile):
            known = {name: value for name, value in asdict(profile).items() if value is not None}
            return {"event": "device.offers", "device": device, **known}
        case DeviceStatus(device, status, is_delay=True):
            return {"event": "device.delayed", "device": device, "reason": status}
        case MessageRejected(device, error):
            return {"event": "message.rejected", "device": device, "error": error}
        case TrackerLeftOut(tracker, reason):
            return {"event": "tracker.left_out", "tracker": tracker, "reason": reason}
        case ReportFailed(reason):
            return {"event": "report.failed", "reason": reason}
    return _result_row(event) or _waiting_row(event)


def _result_row(event: RunEvent) -> Mapping[str, Any] | None:
    """Return the line of what decides which model is the result, and of how good that is."""
    match event:
        case EndedEarly(round_, rounds_without, metric, best):
            row: dict[str, Any] = {"event": "ended.early", "round": round_, "metric": metric}
            return row | {"rounds_without": rounds_without, "best_round": best}
        case BestChosen(round_, _, metric, value):
            return {"event": "best.chosen", "round": round_, "metric": metric, "value": value}
        case TestEvaluated(round_, score):
            return {"event": "test.evaluated", "round": round_, **score}
    return None


def _waiting_row(event: RunEvent) -> Mapping[str, Any] | None:
    """Return the line of what keeps a run waiting, and of what is not waited for any more."""
    row: dict[str, Any]
    match event:
        case Waiting(what, devices, seconds, others_s):
            row = {"event": "waiting", "what": what, "devices": list(devices)}
            return row | {"seconds": round(seconds, 3), "others_s": others_s}
        case WaitingOver(what, device, seconds):
            row = {"event": "waiting.over", "what": what, "device": device}
            return row | {"seconds": round(seconds, 3)}
        case DevicesMissing(round_, ready, least, why, seconds):
            row = {"event": "devices.missing", "round": round_, "ready": list(ready)}
            return row | {"least": least, "why": dict(why), "seconds": round(seconds, 3)}
        case DevicesCutOff(round_, devices, deadline_s):
            row = {"event": "round.deadline", "round": round_, "devices": list(devices)}
            return row | {"deadline_s": deadline_s}
        case WorkDropped(round_, device):
            return {"event": "work.dropped", "device": device, "round": round_}
        case UploadRefused(round_, device, reason):
            row = {"event": "upload.refused", "device": device, "round": round_}
            return row | {"reason": reason}
        case RunRewound(round_, reason):
            return {"event": "run.rewound", "round": round_, "reason": reason}
    return _saving_row(event)


def _saving_row(event: RunEvent) -> Mapping[str, Any] | None:
    """Return the line of a round that is saved on its way, or is not."""
    match event:
        case RoundSaved(round_, step, seconds):
            return {"event": "round.saved", "round": round_, "step": step, "seconds": seconds}
        case RoundHeld(round_, step, devices) | RoundUnsaved(round_, step, devices):
            kind = "round.held" if isinstance(event, RoundHeld) else "round.unsaved"
            return {"event": kind, "round": round_, "step": step, "devices": list(devices)}
    return None


def _shrunk_row(event: PlanShrunk) -> Mapping[str, Any]:
    return {
        "round": event.round,
        "reasons": [event.text],
        **packed(event.plans, "micro_batch"),
    }


def _plan_row(event: PlanMade) -> Mapping[str, Any]:
    found = event.plans
    return {
        "round": event.round,
        "reasons": list(event.reasons),
        **packed(found.plans),
        "server_ranks": found.server_ranks,
        "wave_s": found.wave_s,
        "utility": found.utility,
        "refused": found.refused,
        "importance": dict(event.importance),
    }


def _explained_row(event: PlanMade) -> Mapping[str, Any]:
    """Return what bounds each device's plan, for those who read events."""
    stories = event.plans.explanation.devices
    return {
        "event": "plans.made",
        "round": event.round,
        "why": {
            name: {
                "bound_by": story.binding,
                "needs_bytes": story.planned_bytes,
                # None: unknown, then nothing was bounded by it.
                "budget_bytes": story.budget_bytes if math.isfinite(story.budget_bytes) else None,
                "wave_s": story.device_s,
            }
            for name, story in stories.items()
        },
    }
