"""A run on one page: everything in one file, from whatever a run has left."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.run import ServeConfig
from coordinator.report.write import write_report
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import StorageError

CONFIG_OF = ServeConfig(model="some/where/tiny", preset="hsplitlora", rounds=3, steps_per_round=4)
TIME = "2026-11-29T10:00:{:02}+0000"


def make_folder(path: Path, names: tuple[str, ...] = ("attic", "kitchen")) -> RunFolder:
    """A run of three rounds: a plan that changed, boards that tell of themselves, and trouble."""
    path.mkdir()
    folder = RunFolder(path)
    folder.write_text(CONFIG, dump_config(CONFIG_OF))
    folder.append("metrics.jsonl", {"round": 0, "step": 0, "eval": score(3.0)})
    events: list[dict[str, Any]] = [{"event": "run.started", "run": "r", "step": 0}]
    first_wait = {"round": 0, "ready": [], "least": 2, "why": {}, "seconds": 15.0}
    events.append({"event": "devices.missing", **first_wait})
    for name in names:
        events.append({"event": "device.joined", "device": name, "split": 2, "samples": 90})
    for done in (1, 2, 3):
        own = {name: score(2.5 - done / 10) for name in names}
        row = {"round": done, "step": 4 * done, "samples": 64, "train_loss": 2.8 - done / 10}
        folder.append("metrics.jsonl", {**row, "eval": score(3 - done / 10), "eval_by_device": own})
        costs = {name: cost(done, index) for index, name in enumerate(names)}
        folder.append("telemetry.jsonl", {"round": done - 1, "seconds": 20.0, "devices": costs})
    for round_, split in ((0, 2), (2, 4)):
        plans = {name: {"split": split, "ranks": {"w": 8, "v": 4 * split}} for name in names}
        why = ["first plans"] if not round_ else [f"{names[0]} is 40% slower than measured"]
        folder.append("plans.jsonl", {"round": round_, "reasons": why, "plans": plans})
    left = {"event": "device.left", "device": names[0], "reason": "silent for 30 s <b>"}
    events += [left, left, {"event": "device.left", "device": names[0], "reason": "completed"}]
    events.append({"event": "run.ended", "outcome": "completed"})
    for index, event in enumerate(events):
        folder.append("events.jsonl", {"time": TIME.format(min(59, index)), **event})
    return folder


def score(loss: float) -> dict[str, float]:
    """An evaluation."""
    return {"loss": loss, "accuracy": 0.25, "perplexity": 2.0, "targets": 100}


def cost(done: int, index: int) -> dict[str, Any]:
    """What a device did in a round; its session began anew in the last one."""
    session = 1 if done == 3 else done
    board = {"temperature": 50.0 + done, "power": 5.0 + index, "energy": 100.0 * session}
    return {
        "tokens": 1000,
        "compute_s": 8.0,
        "wait_s": 2.0,
        "peak_bytes": 500_000_000,
        "bytes_up": 3_000_000 * session,
        "bytes_down": 4_000_000 * session,
        "traffic": {"activations_up": 2_000_000 * session, "round_starts_down": 1_000_000},
        "board": {**board, "memory_total": 8e9, "memory_available": 5e9, "throttled": done == 2},
    }


class Reader(HTMLParser):
    """Finds the tables of a page, what it refers to, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a table, a row, a cell."""
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag in ("meta",):
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Close what is open."""
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what closes itself, in a picture."""

    def handle_data(self, data: str) -> None:
        """Keep what a person reads."""
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read(path: Path) -> Reader:
    """Read a page."""
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has ended."""
    return make_folder(tmp_path / "demo")


def test_a_plan_for_a_round_that_never_began_did_nothing(folder: RunFolder) -> None:
    """Blocks and ranks beside what a device did are those with which it did it."""
    plans = {"attic": {"split": 1, "ranks": {"w": 2}}}
    folder.append("plans.jsonl", {"round": 3, "reasons": ["slower"], "plans": plans})

    work = read(write_report(folder, CONFIG_OF)).tables[1]

    assert work[1][2:4] == ["4", "8-16"]


def test_one_device_is_one(tmp_path: Path) -> None:
    """A run of a single device is not one of many."""
    folder = make_folder(tmp_path / "run", ("attic",))

    assert "trained by 1 device: method" in read(write_report(folder, CONFIG_OF)).text


def test_a_run_is_one_file_that_needs_nothing(folder: RunFolder) -> None:
    """No link, no script; each section with its numbers, sums over sessions, equal lines as one."""
    path = write_report(folder, CONFIG_OF)

    page = read(path)
    assert page.links == []
    assert "<script" not in path.read_text("utf-8")
    assert "complete; from 2026-11-29 10:00:00 UTC to" in page.text
    assert "Model tiny, causal-lm, trained by 2 devices: method hsplitlora, 3 of 3" in page.text
    scores, work, plans, traffic, boards, troubles = page.tables
    assert (work[0][4], work[0][-1]) == ("rows held", "program MiB")
    assert scores[1][:3] == ["the coordinator's file", "3.0000", "2.7000"]
    assert work[1] == [
        *("attic", "-", "4", "8-16", "90", "3"),
        *("3,000", "100", "24.0", "6.0", "477"),
    ]
    assert plans[2] == [
        "3",
        "attic is 40% slower than measured",
        "attic: 4 blocks, ranks 8-16; kitchen: 4 blocks, ranks 8-16",
    ]
    assert traffic[0][3:] == [
        "activations up",
        "round starts and residuals down",
        "frames, acks and the rest",
    ]
    assert traffic[1] == ["attic", "9.0", "12.0", "6.0", "2.0", "13.0"]
    assert traffic[-1] == ["all", "18.0", "24.0", "12.0", "4.0", "26.0"]
    assert boards[1] == ["attic", "300", "100.00", "5.0", "53", "2,861", "1"]
    assert troubles[1][1:] == ["left", "attic", "silent for 30 s <b>", "2 times"]
    assert len(troubles) == 2


def test_what_is_drawn_says_its_values(folder: RunFolder) -> None:
    """Charts over samples, time and traffic; a point says what it is; colours are the page's."""
    text = write_report(folder, CONFIG_OF).read_text("utf-8")

    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles[:3] == ["Loss over samples", "Loss over time", "Loss over traffic"]
    assert "Temperature" in titles
    assert "<title>evaluation: 2.7 at 192</title>" in text
    assert "<title>evaluation: 2.7 at 60</title>" in text
    assert "<title>evaluation: 2.7 at 42</title>" in text
    assert text.count("<svg") == len(titles)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r'(stroke|fill)="#', text)


def test_a_fleet_is_drawn_as_a_few_lines(tmp_path: Path) -> None:
    """Of 200 devices charts show lowest, middle and highest; the table has them all."""
    names = tuple(f"board-{n:03}" for n in range(200))
    folder = make_folder(tmp_path / "fleet", names)

    path = write_report(folder, CONFIG_OF)

    page = read(path)
    assert "middle of 200 devices" in page.text
    assert len(page.tables[1]) == 201
    assert path.stat().st_size < 300_000


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    """Nothing is drawn of nothing, and what is not known is said."""
    (tmp_path / "new").mkdir()
    folder = RunFolder(tmp_path / "new")
    folder.write_text(CONFIG, dump_config(CONFIG_OF))

    page = read(write_report(folder, CONFIG_OF, tmp_path / "elsewhere.html"))

    assert "it has not begun" in page.text
    assert "No board told its energy" in page.text
    assert "Nothing that the run has noticed." in page.text
    assert page.tables == []
    assert not (folder.path / "report.html").exists()


def test_what_was_decided_at_the_end_is_said(folder: RunFolder) -> None:
    """An early end, the round whose model is the result, the test, and the newest sample texts."""
    time = TIME.format(30)
    early = {"event": "ended.early", "round": 2, "metric": "loss", "rounds_without": 2}
    folder.append("events.jsonl", {"time": time, **early})
    best = {"event": "best.chosen", "round": 1, "metric": "loss", "value": 2.9}
    folder.append("events.jsonl", {"time": time, **best})
    folder.append("test_results.json", {"round": 1, "test_loss": 2.8, "test_accuracy": 0.5})
    for round_ in (1, 3):
        text = {"round": round_, "prompt": "Say <hello>", "text": f"hello {round_}"}
        folder.append("samples.jsonl", text)

    page = read(write_report(folder, CONFIG_OF))

    assert "It ended after round 3: loss had not improved for 2 rounds." in page.text
    assert "The result is that of round 1: loss 2.9000." in page.text
    assert page.tables[0][-1] == [
        "the test file, once at the end",
        *("-", "2.8000", "-", "-", "-", "50.0%"),
    ]
    assert page.tables[1][1:] == [["Say <hello>", "hello 3"]]


def test_numbers_that_are_none_are_left_out(folder: RunFolder) -> None:
    """A loss that was no number breaks neither chart nor table."""
    row = {"round": 4, "step": 16, "samples": 1, "train_loss": None, "eval": score(1.0)}
    folder.append("metrics.jsonl", {**row, "eval": {**score(1.0), "loss": None}})

    page = read(write_report(folder, CONFIG_OF))

    assert page.tables[0][1][:3] == ["the coordinator's file", "3.0000", "-"]
    assert "nan" not in page.text.lower()


def test_a_page_that_cannot_be_written_is_one_line(folder: RunFolder) -> None:
    """The file is named."""
    with pytest.raises(StorageError, match="the report"):
        write_report(folder, CONFIG_OF, folder.path / CONFIG / "r.html")


def test_a_thousand_devices_fit_one_page(tmp_path: Path) -> None:
    """A report of a large fleet has a row for each device, and no sentence that names them all."""
    names = tuple(f"device-{n:04}" for n in range(1000))

    page = write_report(make_folder(tmp_path / "run", names), CONFIG_OF).read_text("utf-8")

    assert len(page) < 1_000 * len(names)
    assert "and 988 more devices" in page
    assert max(map(len, page.splitlines())) < 40_000
