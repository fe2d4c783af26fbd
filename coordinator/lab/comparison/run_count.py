"""How far a comparison is: which run of how many, what it is doing, when all will be over.

Knows no training; the clock is an argument.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundDone
from edge_sdk.duration import duration

Tell = Callable[[str], None]


def tell_nobody(_text: str) -> None:
    """Say nothing."""


class RunCount:
    """Counts the runs of a comparison and tells what there is to tell.

    Args:
        methods: The method of each run that is to come, in their order.
        tell: Gets a line for each run that has ended.
        now: Gets what is being done at the moment; each text takes the place of the one before.
        clock: Seconds that never go back.
        num_searches: How many searches may still ask for further runs.
    """

    def __init__(
        self,
        methods: Sequence[str],
        tell: Tell,
        now: Tell,
        clock: Callable[[], float],
        num_searches: int = 0,
    ) -> None:
        self._methods, self._tell, self._show, self._clock = list(methods), tell, now, clock
        self._num_searches = num_searches
        self._done = self._kept = self._num_run = 0
        self._took: list[tuple[str, float]] = []
        """Method and seconds of the runs that have ended."""
        self._began_s = clock()
        self._name, self._doing, self._share = "", "", 0.0

    @property
    def total(self) -> int:
        """Number of all runs."""
        return len(self._methods)

    @property
    def _of(self) -> str:
        """The number of all runs, as far as that is known."""
        return f"at least {self.total}" if self._num_searches else str(self.total)

    def further(self, method: str) -> None:
        """Note that a search asks for one more run, which is the next."""
        self._methods.insert(self._done, method)

    def search_ended(self, text: str = "") -> None:
        """Note that a search asks for no more runs, and tell what has come of it."""
        self._num_searches -= 1
        if text:
            self.tell_kept()
            self._tell(text)

    @property
    def done(self) -> int:
        """Number of the runs that have ended, in this comparison or before."""
        return self._done

    def kept(self, took_s: float) -> None:
        """Note that the next run was there already, and the seconds that it took then."""
        self._note(took_s)
        self._kept += 1

    def begin(self, name: str) -> None:
        """Note that the next run begins."""
        self.tell_kept()
        self._began_s, self._name, self._share = self._clock(), name, 0.0
        self.doing("getting ready")

    def doing(self, what: str, share: float = 0.0) -> None:
        """Show what the run is doing, and which share of it is done."""
        self._share = max(share, self._share)
        where = f"run {self._done + 1} of {self._of}: {what}{self._left()}"
        self._show(f"{where}: {self._name}")

    def end(self, text: str) -> float:
        """Note that the run has ended; return the seconds that it took."""
        took_s = self._clock() - self._began_s
        name, self._share = self._name, 0.0
        self._num_run += 1
        self._note(took_s)
        self._began_s = self._clock()
        words = f"run {self._done} of {self._of}: {name}: {text}; {duration(took_s)}"
        self._tell(words + (self._left() if self._done < self.total else ""))
        return took_s

    def skip(self, text: str) -> None:
        """Note that the next run cannot be, and why."""
        self.tell_kept()
        self._tell(f"run {self._done + 1} of {self._of}: {text}")
        del self._methods[self._done]

    @property
    def num_run(self) -> int:
        """Number of the runs that were not there already."""
        return self._num_run

    def tell_kept(self) -> None:
        """Say how many runs were there already, once."""
        if self._kept:
            are = "was" if self._kept == 1 else "were"
            self._tell(f"{self._kept} of {self._of} runs {are} there already")
            self._kept = 0

    def _note(self, took_s: float) -> None:
        self._took.append((self._methods[self._done], took_s))
        self._done += 1

    def _left(self) -> str:
        """Return how long all that is left will take, where that can be said."""
        left_s = self.left_s()
        least = "at least" if self._num_searches else "about"
        return "" if left_s is None else f"; {least} {duration(left_s)} left"

    def left_s(self) -> float | None:
        """Return the seconds until the last run ends; None where nothing is known yet."""
        spent_s = self._clock() - self._began_s if self._share else 0.0
        guess_s = spent_s / self._share if self._share else None
        if not self._took and guess_s is None:
            return None
        left = [self._usual_s(method, guess_s) for method in self._methods[self._done :]]
        if self._share and left:  # what this run tells of itself counts more than other runs
            left[0] = max(0.0, (guess_s or left[0]) - spent_s)
        return sum(left)

    def _usual_s(self, method: str, guess_s: float | None) -> float:
        own = [took_s for other, took_s in self._took if other == method]
        everybody = [took_s for _, took_s in self._took]
        return statistics.fmean(own or everybody or [guess_s or 0.0])


class RoundTeller:
    """Tells a count which round of a run is done; a watcher."""

    def __init__(self, count: RunCount, rounds: int, part: tuple[int, int] = (0, 1)) -> None:
        self._count, self._rounds, self._part = count, rounds, part

    def see(self, event: RunEvent) -> None:
        """Say that a round is done."""
        if isinstance(event, RoundDone):
            done, (index, parts) = event.row["round"], self._part
            who = f"device {index + 1} of {parts}, " if parts > 1 else ""
            share = (index + done / self._rounds) / parts
            self._count.doing(f"{who}round {done} of {self._rounds}", share)
