"""A thread that feeds one tracker: whatever that does, nobody in the run waits for it.

What comes is queued, and the queue is bounded. The steps that a tracker has been given are written
down before it gets them, so that a run that goes on gives it no step twice.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coordinator.results.json_text import json_text
from coordinator.tracking.names import Moment, TrackedRun, Tracker
from edge_sdk.errors import EdgeError, public_text
from edge_sdk.files import atomic_write

# Events that may wait: minutes of a large fleet, and some tens of MB at most.
QUEUE = 20_000
# Seconds between two handings-over: one message to a service then carries many numbers.
EVERY_S = 1.0
# Seconds after which a tracker that does not come back from one call is not waited for any more;
# the libraries themselves give up a service that does not answer after 90 to 120 s.
PATIENCE_S = 150.0
# A name and a password in an address that an error quotes, whatever but a space stands in them.
_SECRET = re.compile(r"//\S*@")


class Feed:
    """Hands events to one tracker, as numbers."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        about: TrackedRun,
        in_numbers: Callable[[Any, float], Sequence[Moment]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to feed a tracker.

        Args:
            name: Its name.
            tracker: What is fed.
            about: The run.
            in_numbers: What an event says, and its Unix time, in numbers; called in the thread.
            clock: Seconds.
        """
        self.name = name
        self.failure = ""
        """Why nothing is handed over any more; empty while all is well."""
        self._tracker, self._about, self._clock = tracker, about, clock
        self._in_numbers = in_numbers
        self._queue: queue.Queue[tuple[float, object]] = queue.Queue(QUEUE)
        self._closing = threading.Event()
        self._completed = False
        self._busy_since_s: float | None = None
        self._file = about.folder / f"{name}.json"
        self._given: dict[str, int] = {}
        """The last step that the tracker was given, by source."""
        self._thread = threading.Thread(target=self._run, name=f"edgesplit-{name}", daemon=True)
        self._thread.start()

    def offer(self, event: object) -> None:
        """Queue *event*; never waits."""
        if self.failure:
            return
        try:
            self._queue.put_nowait((time.time(), event))
        except queue.Full:
            self._fail(f"it does not keep up: {QUEUE:,} events wait for it")
        since_s = self._busy_since_s
        if since_s is not None and self._clock() - since_s > PATIENCE_S:
            self._fail(f"it has not answered for {PATIENCE_S:.0f} s")

    def _fail(self, reason: str) -> None:
        """Give up; the first reason counts."""
        self.failure = self.failure or public_text(_SECRET.sub("//...@", reason))

    def end(self, *, completed: bool) -> None:
        """Say that nothing more comes."""
        self._completed = completed
        self._closing.set()

    def wait(self, seconds: float) -> None:
        """Wait so long for the end; one that needs longer is abandoned."""
        self._thread.join(0.0 if self.failure else max(0.0, seconds))
        if not self._thread.is_alive():
            return
        self._fail("it was not done when the run ended; its last numbers may be missing")
        self._tracker.abandon()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._serve()
        except EdgeError as error:
            self._fail(str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - libraries raise whatever they like
            self._fail(": ".join(filter(None, [type(error).__name__, str(error)])))

    def _serve(self) -> None:
        self._begin()
        while not (self._closing.is_set() and self._queue.empty()):
            self._hand_over(self._gather())
            if self.failure:
                return
        self._busy_since_s = self._clock()
        self._tracker.close(completed=self._completed)
        self._busy_since_s = None

    def _begin(self) -> None:
        try:
            before = json.loads(self._file.read_bytes())
            ident, self._given = before["ident"], dict(before["given"])
        except (OSError, ValueError, KeyError, TypeError):
            ident = None
        self._busy_since_s = self._clock()
        self._ident = self._tracker.open(replace(self._about, ident=ident))
        self._busy_since_s = None
        if not self._tracker.takes_live:
            self._write()

    def _gather(self) -> list[Moment]:
        """Wait for a moment and return what has come in it."""
        self._closing.wait(EVERY_S)
        found: list[Moment] = []
        for _ in range(self._queue.qsize()):
            time_s, event = self._queue.get_nowait()
            found += self._in_numbers(event, time_s)
        return found

    def _hand_over(self, samples: Sequence[Moment]) -> None:
        fresh = [sample for sample in samples if self._is_wanted(sample)]
        if not fresh:
            return
        if not self._tracker.takes_live:
            self._write()
        self._busy_since_s = self._clock()
        self._tracker.take(fresh)
        self._busy_since_s = None

    def _is_wanted(self, sample: Moment) -> bool:
        if sample.is_live:
            return self._tracker.takes_live
        if sample.step <= self._given.get(sample.source, -1) and not self._tracker.takes_live:
            return False
        self._given[sample.source] = max(sample.step, self._given.get(sample.source, -1))
        return True

    def _write(self) -> None:
        text = json_text({"ident": self._ident, "given": self._given})
        atomic_write(self._file, text, sync=False, what="what a tracker was given")
