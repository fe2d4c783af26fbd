"""Bytes are those of the whole run, whatever sessions and restarts it consists of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.config.run import ServeConfig
from coordinator.report.run_sums import RunSums
from coordinator.results.events.rounds import StepDone, Telemetry
from coordinator.results.history import RunHistory
from coordinator.results.metrics import Reporting
from coordinator.results.run_folder import RunFolder
from coordinator.results.session_counters import SessionCounters
from coordinator.results.watchers import RunFiles
from coordinator.tracking.numbers import Numbers, so_far
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import Stamp, StepReport

amounts = st.lists(st.integers(1, 9), min_size=1, max_size=6)
# Sessions of a device: what each moves between two looks.
sessions = st.lists(amounts, min_size=1, max_size=4)
NAMES = ("a", "b")


@given(sessions, st.sets(st.integers(0, 3)), st.booleans())
def test_sums_are_those_of_all_sessions(
    found: list[list[int]], restarts: set[int], is_named: bool
) -> None:
    """Looked at after each amount, and carried over restarts, the sum misses nothing."""
    counters, total, seen = SessionCounters[int](), 0, 0
    for number, session in enumerate(found):
        # Where nobody names sessions, only a count that is lower tells two of them apart.
        moved = session if is_named else [*session, 10]
        now = 0
        if number in restarts:  # the coordinator was started again, from its checkpoint
            facts = counters.facts()
            counters = SessionCounters()
            counters.load(facts)
        for amount in moved:
            now += amount
            total += amount
            seen = counters.take("a", {"up": now}, str(number) if is_named else "")["up"]
    assert seen == total == counters.total("up")


def test_a_session_after_a_restart_may_count_as_far() -> None:
    """Nobody can tell two unnamed sessions apart by their counts: a restart says it."""
    before, after = SessionCounters[int](), SessionCounters[int]()
    before.take("a", {"up": 5, "down": 3})
    after.load(before.facts())

    assert after.take("a", {"up": 5, "down": 4}) == {"up": 10, "down": 7}


def test_a_device_that_stays_away_between_two_restarts_is_not_forgotten() -> None:
    """Its sums stand in the next checkpoint, too."""
    first, second = SessionCounters[int](), SessionCounters[int]()
    first.take("a", {"up": 5})
    second.load(first.facts())

    assert second.facts() == {"a": {"up": 5}}


class Links:
    """A gateway of which only the counters matter; it counts everything a second time."""

    def __init__(self, moved: Counter[str]) -> None:
        self.moved = moved
        self.now: Counter[str] = Counter()
        self.present: set[str] = set()

    def devices(self) -> list[str]:
        """Who is connected."""
        return sorted(self.present)

    def move(self, device: str, num_bytes: int) -> None:
        """Carry bytes up, and twice as many down."""
        self.present.add(device)
        self.now[device] += num_bytes
        self.moved[device] += num_bytes

    def stats(self, device: str) -> Any:
        """Bytes of a session."""
        if device not in self.present:
            raise PeerGone(device)
        up = self.now[device]
        kinds = {"activations_up": up, "parts_down": 2 * up}
        energy = {"energy": 1.0 * self.moved[device]}  # the device's program has no restart
        return SimpleNamespace(
            session="", bytes_up=up, bytes_down=2 * up, traffic=kinds, telemetry=energy
        )


class Told:
    """Writes a run's files and feeds a tracker, as a coordinator's process does."""

    def __init__(self, folder: RunFolder, config: ServeConfig) -> None:
        self._files, self.numbers = RunFiles(folder), Numbers(config)
        self.numbers.of(so_far(RunHistory(folder)))
        self.found: dict[str | None, float] = {}

    def see(self, event: Any) -> None:
        """Take an event."""
        self._files.see(event)
        if isinstance(event, StepDone | Telemetry):
            for moment in self.numbers.of(event):
                self.found |= {
                    n.device: n.value for n in moment.numbers if n.name == "traffic/up_bytes"
                }


def step(device: str) -> StepReport:
    """A step of a device."""
    return StepReport(
        stamp=Stamp(device=device),
        loss=1.0,
        num_targets=4,
        num_sequences=2,
        num_tokens=8,
        compute_s=0.5,
        wait_s=0.25,
        peak_bytes=100,
    )


def test_a_run_resumed_twice_is_counted_once(tmp_path: Path) -> None:
    """Trackers, history and report say what links have carried in all, also of who was away."""
    folder, config = RunFolder.create(tmp_path, "run"), ServeConfig(model="m", rounds=6)
    moved: Counter[str] = Counter()
    checkpoint, told = "", None
    # Processes of a coordinator: who moves how many bytes in each of its rounds.
    processes = (
        [{"a": 50, "b": 70}, {"a": 20, "b": 5}],
        [{"a": 80}],
        [{"a": 3, "b": 90}, {"b": 9}],
    )
    for number, rounds in enumerate(processes):
        links: Any = Links(moved)
        told = Told(folder, config)
        reporting = Reporting(told, is_classifier=False, gateway=links)
        if checkpoint:
            reporting.load_costs(json.loads(checkpoint))
        for index, round_ in enumerate(rounds):
            for device, num_bytes in round_.items():
                links.move(device, num_bytes)
                reporting.step(device, step(device), 1)
            reporting.telemetry(2 * number + index)
            reporting.end_round(2 * number + index + 1, 1, {}, None)
        checkpoint = json.dumps(reporting.costs())

    assert told is not None
    history, sums = RunHistory(folder), RunSums(folder, config)
    assert moved == {"a": 153, "b": 174}
    assert {name: told.found[name] for name in NAMES} == moved
    assert {name: history.cost(name).bytes_up for name in NAMES} == moved
    assert history.traffic()[6] == (sum(moved.values()), 2 * sum(moved.values()))
    assert {name: sums.devices[name].up_bytes for name in NAMES} == moved
    assert {name: sums.devices[name].kinds["parts_down"] for name in NAMES} == {
        name: 2 * num_bytes for name, num_bytes in moved.items()
    }
    assert {name: sums.devices[name].joules for name in NAMES} == moved
