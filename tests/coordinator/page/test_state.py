"""What the page shows of a run is what its files say, in parts that stay small."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from coordinator.page.curves import MOST_LINES, thin
from coordinator.page.pieces import changes
from coordinator.page.state import PageState
from coordinator.page.stories import CHUNK, MOST_EVENTS, event_chunks
from coordinator.results.events.devices import MessageRejected
from coordinator.results.events.rounds import RunRewound
from coordinator.results.events.run import RunFinished
from coordinator.results.history import RunHistory
from coordinator.results.lifecycle import STOPPED
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.results.run_lock import locked
from coordinator.results.standing.standing import stand
from coordinator.results.standing.words import head
from tests.coordinator.page.recorded import BLOCKS, KINDS, STEPS, Recording


def values(state: PageState) -> dict[str, Any]:
    """Return the parts as a browser has them."""
    return {name: json.loads(part.text) for name, part in state.parts.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Three devices, four rounds."""
    return Recording(tmp_path_factory.mktemp("three"), ["a", "b", "c"], 4).play()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Two hundred devices, in their last round."""
    names = [f"device-{number:03d}" for number in range(200)]
    return Recording(tmp_path_factory.mktemp("many"), names, 3).play(ends=False)


def test_a_card_shows_what_is_known_of_a_device(three: Recording) -> None:
    """Board, blocks, ranks, pace, waiting, link, memory, heat and power are those of its files."""
    state = PageState(three.path)
    state.refresh()
    parts = values(state)

    card = parts["device:a"]
    assert card["board"]["board"] == "Jetson Orin Nano 8GB"
    assert (card["split"], card["step"], card["tone"]) == (2, 40, "done")
    assert card["compute_s"] + card["wait_s"] == pytest.approx(1.4)
    assert (card["memory_total"], card["power"]) == (8e9, 6.5)
    assert card["up_bytes_per_s"] is None  # it sends nothing any more
    strip = parts["model"]["strips"]["a"]
    assert parts["model"]["kinds"] == sorted(KINDS)
    assert (parts["model"]["blocks"], len(strip), len(strip[0])) == (BLOCKS, 2, len(KINDS))


def test_a_device_s_tone_follows_what_happens(three: Recording) -> None:
    """While somebody holds the run its devices train or are late; afterwards they are done."""
    state = PageState(three.path)
    state.refresh()
    assert {values(state)[f"device:{name}"]["tone"] for name in "abc"} == {"done"}

    with locked(three.path):
        state.refresh()
        assert values(state)["run"]["is_running"]
    state.refresh()
    assert not values(state)["run"]["is_running"]


def test_a_run_that_was_stopped_after_a_round_is_at_rest(tmp_path: Path) -> None:
    """Rounds that are done, the plan that was in force, and no alarm: somebody wanted this."""
    recording = Recording(tmp_path, ["a", "b"], 4)
    recording.rounds = 2  # it plans for the third
    recording.play(ends=False)
    recording.watcher.see(RunFinished(STOPPED))
    recording.folder.save_checkpoint(2 * STEPS, Checkpoint({}, {"engine": {}, "ledger": {}}), 1)
    state = PageState(recording.path)
    state.refresh()

    parts, plans = values(state), RunHistory(recording.folder).plans

    assert (parts["run"]["round"], parts["run"]["rounds"]) == (2, 4)
    assert {parts[name]["tone"] for name in ("run", "device:a", "device:b")} == {"rest"}
    assert [row["round"] for row in plans] == [0, 2]
    first, second = (
        [row["plans"]["a"]["ranks"][f"model.layers.0.{kind}"] for kind in sorted(KINDS)]
        for row in plans
    )
    assert parts["model"]["strips"]["a"][0] == first != second
    assert [one["round"] for one in parts["plannings"]] == [1]
    found = stand(recording.folder, recording.config, datetime.now().astimezone())
    assert head(found)[1].startswith(f"2 of 4 rounds, step {2 * STEPS} of {4 * STEPS}, ")


def test_nothing_new_is_nothing_to_send(three: Recording) -> None:
    """A run that stands still costs a look at its folder, and no byte for anybody."""
    state = PageState(three.path)
    assert state.refresh()
    sent = {name: part.version for name, part in state.parts.items()}

    assert not state.refresh()
    assert changes(state.parts, sent) is None


def test_what_is_sent_makes_what_there_is(three: Recording) -> None:
    """Whatever somebody has, the changes turn it into the state; parts that are gone are named."""
    state = PageState(three.path)
    state.refresh()
    newest = {name: part.version for name, part in state.parts.items()}
    have = {**newest, "curves": 0, "device:gone": 3}
    del have["plan"]

    found = json.loads(changes(state.parts, have) or "")

    assert found["set"].keys() == {"curves", "plan"}
    assert found["gone"] == ["device:gone"]
    assert found["set"]["plan"] == values(state)["plan"]


def test_two_hundred_devices_stay_small(many: Recording) -> None:
    """The whole state is below 1 MB, and curves of many devices are a band instead of lines."""
    state = PageState(many.path)
    state.refresh()
    parts = values(state)

    assert sum(len(part.text) for part in state.parts.values()) < 1_000_000
    assert parts["totals"]["devices"] == 200
    assert "lines" not in parts["curves"]["train"]
    assert all(
        low <= middle <= high
        for low, middle, high in filter(None, parts["curves"]["train"]["band"])
    )
    assert max(len(line) for row in parts["plannings"] for line in row["moved"]) < 200


def test_no_text_of_the_data_is_told(three: Recording) -> None:
    """Of samples only the coordinator's own prompts and what the model wrote to them are shown."""
    three.folder.append("samples.jsonl", {"round": 2, "prompt": "Once", "text": "upon", "own": "x"})
    state = PageState(three.path)
    state.refresh()

    assert values(state)["samples"] == [{"round": 2, "prompt": "Once", "text": "upon"}]


def test_only_the_last_piece_of_the_events_changes(tmp_path: Path) -> None:
    """A run with endless trouble sends the newest events, each of them once."""
    run = Recording(tmp_path, ["a"], 1)
    for number in range(MOST_EVENTS + 3 * CHUNK):
        run.watcher.see(MessageRejected("a", f"bad {number}"))
    before = event_chunks(RunHistory(RunFolder(run.path)))
    run.watcher.see(RunRewound(0, "diverged"))
    after = event_chunks(RunHistory(RunFolder(run.path)))

    assert MOST_EVENTS <= sum(map(len, before.values())) <= MOST_EVENTS + CHUNK
    assert len([name for name in after if after[name] != before.get(name)]) == 1
    assert list(after.values())[-1][-1]["text"] == "back to the last good state: diverged"


@pytest.mark.parametrize(
    "row",
    [
        {"event": "round.started"},
        {"event": "device.left", "device": 3, "reason": None},
        {"event": "of a later version", "about": {"x": 1}},
        {"event": "waiting", "what": "step", "seconds": "long", "devices": None},
        {"event": None},
    ],
)
def test_a_strange_line_is_shown_as_it_is(tmp_path: Path, row: dict[str, Any]) -> None:
    """Events of another version hide nothing and end nothing."""
    folder = RunFolder.create(tmp_path, "run")
    folder.append("events.jsonl", {"time": "2026-11-29T10:02:11+0000", **row})

    [[told]] = event_chunks(RunHistory(folder)).values()

    assert isinstance(told["text"], str)
    assert told["device"] is None


def test_curves_are_thinned_evenly() -> None:
    """The first and the last point stay, and there are no more than may be."""
    assert thin(range(5), 10) == [0, 1, 2, 3, 4]
    assert thin(range(1001), 11) == list(range(0, 1001, 100))
    assert MOST_LINES < 200
