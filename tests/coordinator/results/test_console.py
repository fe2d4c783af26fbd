"""A terminal without bars shows what happens as plain lines, one for each event that has words."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.results.console import Console
from coordinator.results.events.devices import (
    DeviceJoined,
    DeviceLeft,
    DeviceStatus,
    MessageRejected,
)
from coordinator.results.events.rounds import (
    RoundAbandoned,
    RoundDone,
    RoundStarted,
    StepDone,
    WaitEnded,
)
from coordinator.results.events.run import Exported, Listening, RunPaused
from edge_sdk.protocol.messages import Stamp, StepReport


def test_events_become_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is the one that operators know; what only files hold is not shown."""
    report = StepReport(
        stamp=Stamp(step=2),
        loss=1.25,
        num_targets=5,
        num_sequences=1,
        num_tokens=8,
        compute_s=0.1,
        wait_s=0.1,
        peak_bytes=3 * 2**20,
    )
    scores = {"a": {"loss": 1.0, "perplexity": 2.718}, "b": {"loss": 1.0, "perplexity": 3.0}}
    with Console(6) as console:
        for event in (
            Listening(Path("runs/r"), "tcp://*:7070"),
            DeviceStatus("a", "fetching its blocks"),
            DeviceJoined("a", 2, 9),
            RoundStarted(0, 1, ["a"], {}),
            StepDone("a", report, 6, (2**20, 2**21)),
            StepDone("a", report, 3, None),
            RoundDone({"round": 1, "train_loss": 1.5, "eval_by_device": scores}, {}),
            RoundDone({"round": 2}, {}),
            RoundDone({"round": 2, "train_loss": 1.5, "lag": 0.0573}, {}),
            RoundAbandoned(2),
            WaitEnded(["a", "b"]),
            MessageRejected("b", "bad"),
            DeviceLeft("a", "silent for 9 s"),
            RunPaused(Path("runs/r")),
            Exported("adapter", 1e-7, Path("runs/r/adapter")),
            Exported("adapter", 1e-7),
        ):
            console.see(event)

    lines = capsys.readouterr().err.splitlines()
    step = lines.pop(3)
    assert step.startswith("a: step 3/6  loss  1.250  ")
    assert step.endswith("tok/s  up 1.0  down 2.1 MB  program     3 MiB")
    assert lines == [
        "run runs/r: listening at tcp://*:7070",
        "a: fetching its blocks",
        "a: ready",
        "round  1  train loss 1.500  perplexity: a 2.72  b 3.00",
        "round  2  train loss 1.500  lag up to 5.7%",
        "round 3 starts again: too few devices are left",
        "going on without a, b: not back yet",
        "b: rejected: bad",
        "a: left: silent for 9 s",
        "paused; go on with: coordinator resume runs/r",
        "adapter: runs/r/adapter (read back, logits differ by 1e-07 at most)",
    ]


def test_bars_are_for_terminals_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours that are asked for everywhere, as on CI, draw no bars into a file."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Console(6) as console:
        console.see(DeviceStatus("a", "fetching its blocks"))

    assert capsys.readouterr().err == "a: fetching its blocks\n"


def test_a_fleet_has_no_line_for_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand devices that join and step are a few lines, which say how many do what."""
    report = StepReport(
        stamp=Stamp(step=2),
        loss=1.25,
        num_targets=5,
        num_sequences=1,
        num_tokens=8,
        compute_s=0.1,
        wait_s=0.1,
        peak_bytes=3 * 2**20,
    )
    names = [f"device-{n:04}" for n in range(1000)]
    scores = {name: {"loss": 1.0, "perplexity": 2.0} for name in names}
    with Console(6) as console:
        for name in names:
            console.see(DeviceJoined(name, 2, 9))
        console.see(RoundStarted(0, 1, names[:50], {}, names[50:]))
        for name in names[:50]:
            console.see(StepDone(name, report, 3, None))
        console.see(RoundDone({"round": 1, "train_loss": 1.5, "eval_by_device": scores}, {}))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 60
    assert lines[40] == "41 devices: 41 ready; `coordinator status RUN` lists them"
    drawn = "round 1: 50 of 1000 devices: device-0000, device-0001, device-0002, device-0003,"
    assert f"{drawn} device-0004 and 45 more" in lines
    assert lines[-1].endswith("device-0011 2.00  and 988 more")
