"""The latest steps and computations stand in the live file, bounded and as they were told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from coordinator.results.events.rounds import RoundDone, StepDone, Telemetry
from coordinator.results.events.run import FolderKnown
from coordinator.results.run_folder import LIVE
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.standing.observed import Computed
from coordinator.results.standing.timeline import MOST
from edge_sdk.protocol.messages import Stamp, StepReport


def step(number: int, traffic: tuple[int, int] | None = None) -> StepDone:
    """Device a has done a step in half a second."""
    report = StepReport(
        stamp=Stamp(run="r", device="a", step=number),
        loss=2.0,
        num_targets=9,
        num_sequences=1,
        num_tokens=10,
        compute_s=0.3,
        wait_s=0.2,
        peak_bytes=1,
    )
    return StepDone("a", report, 10, traffic)


def live(folder: Path) -> LiveFile:
    """A live file whose clock moves by a second with each event."""
    clock = itertools.count(0.0)
    made = LiveFile(lambda: next(clock))
    made.see(FolderKnown(folder))
    return made


def test_who_computed_and_who_waited_is_told(tmp_path: Path) -> None:
    """A step has its device, end, computing, waiting, number, loss; a wave what and whose."""
    watcher = live(tmp_path)

    watcher.see(Computed("forward", ["a", "b"], 0.25))
    watcher.see(step(3))

    found = json.loads((tmp_path / LIVE).read_bytes())["timeline"]
    assert found == {
        "now_s": 2.0,
        "steps": [["a", 2.0, 0.3, 0.2, 4, 2.0]],
        "computed": [["forward", 1.0, 0.25, ["a", "b"]]],
    }


def test_a_computation_writes_nothing_by_itself(tmp_path: Path) -> None:
    """Hundreds of waves a second are no more writing than the steps that they belong to."""
    watcher = live(tmp_path)
    before = (tmp_path / LIVE).stat()

    for _ in range(50):
        watcher.see(Computed("wave", ["a"], 0.01))

    after = (tmp_path / LIVE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    """However long a run is, the file stays small."""
    watcher = live(tmp_path)
    for number in range(MOST + 50):
        watcher.see(Computed("wave", ["a"], 0.01))
        watcher.see(step(number))
    watcher.see(RoundDone({"round": 1}, {}))

    found = json.loads((tmp_path / LIVE).read_bytes())["timeline"]
    assert (len(found["steps"]), len(found["computed"])) == (MOST, MOST)
    assert found["steps"][-1][4] == MOST + 50


def test_how_fast_the_link_is_now(tmp_path: Path) -> None:
    """Rates are those of the latest steps; a new session, which counts from 0, breaks none."""
    watcher = live(tmp_path)
    for number, up in enumerate((1000, 3000, 5000, 100)):
        watcher.see(step(number, (up, 2 * up)))

    mine = json.loads((tmp_path / LIVE).read_bytes())["devices"]["a"]
    assert mine["bytes_up"] == 100
    assert mine["up_bytes_per_s"] == pytest.approx(4000 / 3)
    assert mine["down_bytes_per_s"] == pytest.approx(8000 / 3)


def test_what_a_round_s_end_has_carried_is_not_counted_twice(tmp_path: Path) -> None:
    """Adapters travel after a round's last step: the file knows them when the next round begins."""
    watcher = live(tmp_path)
    watcher.see(step(0, (1000, 2000)))
    watcher.see(Telemetry(0, 1.0, {"a": {"bytes_up": 1500, "bytes_down": 2100}}))

    mine = json.loads((tmp_path / LIVE).read_bytes())["devices"]["a"]
    assert (mine["bytes_up"], mine["bytes_down"]) == (1500, 2100)
