"""A watcher that shows a run to trackers. They can change nothing and cost the run nothing.

One that fails, hangs or does not keep up is told of once, and left out from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.results.events.event import RunEvent, Watcher
from coordinator.results.events.reporting import TrackerLeftOut
from coordinator.results.events.run import RunFinished, RunStarted, StopAsked
from coordinator.results.history import RunHistory
from coordinator.results.lifecycle import COMPLETED, STOPPED, TRACKERS
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import RunFiles, Watchers
from coordinator.tracking.feed import Feed
from coordinator.tracking.names import TrackedRun
from coordinator.tracking.numbers import COUNTED, Numbers, so_far
from coordinator.tracking.trackers import KINDS
from edge_sdk.errors import StorageError

# Seconds for trackers to finish after a run.
FINISH_S = 15.0
# Seconds after Ctrl-C in which they have finished, and those that come on top: containers are
# killed after 10, and one that hangs takes a moment to be let go.
LEAVE_S, LEAST_S = 8.0, 0.5
# What is told of a run: how it is trained. No file, address, key, or name of a data set.
_TOLD = (
    "preset",
    "task",
    "labels",
    "rounds",
    "steps_per_round",
    "waves",
    "round_mode",
    "aggregation",
    "server_learning_rate",
    "trained_by",
    "max_rank",
    "server_rank",
    "max_length",
    "min_devices",
    "default",
    "lora",
    "training",
    "planning",
)


@contextmanager
def reporting(config: ServeConfig, folder: RunFolder, watcher: Watcher) -> Iterator[Watcher]:
    """Yield a watcher that shows events to *watcher*, and then to what `report_to` names.

    At the end trackers get a moment to finish.
    """
    if not config.report_to:
        yield watcher
        return
    reporter = Reporter(config, folder, watcher)
    try:
        yield Watchers([watcher, reporter])
    finally:
        reporter.close()


class Reporter:
    """Shows events to trackers, each in a thread of its own."""

    def __init__(
        self,
        config: ServeConfig,
        folder: RunFolder,
        watcher: Watcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the trackers of *config*.

        Args:
            config: The run.
            folder: Its folder.
            watcher: Hears of a tracker that is left out, after the folder's files.
            clock: Seconds.
        """
        self._folder, self._clock = folder, clock
        self._told = Watchers([RunFiles(folder), watcher])
        self._outcome = ""
        self._stopped_s: float | None = None
        path = folder.path / TRACKERS
        path.mkdir(mode=0o700, exist_ok=True)
        about = TrackedRun(name=folder.name, folder=path, facts=facts_of(config), config=config)
        self._feeds = [
            Feed(name, KINDS[name].make(), about, Numbers(config).of, clock)
            for name in config.report_to
        ]
        self._in_use = list(self._feeds)

    def see(self, event: RunEvent) -> None:
        """Queue *event* for every tracker, and tell of those that have failed."""
        if isinstance(event, RunStarted) and event.step:
            self._go_on()
        elif isinstance(event, COUNTED):
            for feed in self._in_use:
                feed.offer(event)
        elif isinstance(event, RunFinished):
            self._outcome = event.outcome
        elif isinstance(event, StopAsked) and event.is_urgent:
            self._stopped_s = self._clock()
        self._look()

    def _go_on(self) -> None:
        try:
            before = so_far(RunHistory(self._folder))
        except StorageError:  # whoever needs the files says so
            return
        for feed in self._in_use:
            feed.offer(before)

    def _look(self) -> None:
        for feed in [feed for feed in self._in_use if feed.failure]:
            self._in_use.remove(feed)
            self._told.see(TrackerLeftOut(feed.name, feed.failure))

    def close(self) -> None:
        """Let trackers finish, as long as there is time."""
        end_s = self._clock() + FINISH_S
        if self._stopped_s is not None:
            end_s = max(self._stopped_s + LEAVE_S, self._clock() + LEAST_S)
        for feed in self._feeds:
            feed.end(completed=self._outcome in (COMPLETED, STOPPED))
        for feed in self._feeds:
            feed.wait(end_s - self._clock())
        self._look()


def facts_of(config: ServeConfig) -> dict[str, Any]:
    """Return how a run is trained, flat."""
    found: dict[str, Any] = {"model": Path(config.model).name}
    for name in _TOLD:
        found |= _flat(name, getattr(config, name))
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for each in fields(value):
            found |= _flat(f"{name}.{each.name}", getattr(value, each.name))
        return found
    if value is None or isinstance(value, str | int | float | bool):
        return {name: value}
    if isinstance(value, Sequence):
        return {name: ", ".join(map(str, value))}
    return {}
