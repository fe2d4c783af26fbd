"""Planning in a thread of its own, one question after the other; the loop goes on meanwhile.

Only here is the planner of a run touched. While somebody thinks about a question, whoever asks sees
the plans as they were before it, and what changes little waits until the answer is there. What is
asked, and what is done with an answer, stands in `changes.py`.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from coordinator.planning.interface import Planning
from coordinator.planning.plan_set import PlanSet
from edge_sdk.protocol.plan import Plan


def _holds(_answer: Any) -> bool:
    return True


def _nobodys(_device: str) -> AbstractContextManager[None]:
    return nullcontext()


def _ignore(_answer: Any) -> None:
    """Do nothing with an answer."""


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """Something to think about, and what becomes of the answer."""

    think: Callable[[Planning], Any]
    """Called in the planning thread: it sees the planner and nothing that the loop changes."""
    then: Callable[[Any], None]
    """Called with the answer, in the loop's thread."""
    devices: tuple[str, ...] = ()
    """Whose plans it is about; empty: everybody's. An error belongs in the part of one alone."""
    fits: Callable[[Any], bool] = _holds
    """Whether an answer, None for an error, still fits what has happened meanwhile."""
    otherwise: Callable[[], None] = _nothing
    """Called where it does not: the planner then knows no more than before the question."""


@dataclass(frozen=True)
class _Note:
    """A small change to what plans are made of."""

    device: str
    change: Callable[[Planning], None]


class PlanningDesk:
    """The planner of a run as the loop sees it."""

    def __init__(
        self, planner: Planning, wake: Callable[[], None], pool: Executor | None = None
    ) -> None:
        """Let somebody think.

        Args:
            planner: The planner, which from now on only this object calls.
            wake: Interrupts the loop's wait when an answer is there; called from any thread.
            pool: Where plans are made; None: in a thread of its own.
        """
        self._planner, self._wake = planner, wake
        self._pool = pool or ThreadPoolExecutor(1, "planning")
        self._due: deque[Inquiry | _Note] = deque()
        self._asked: Inquiry | None = None
        """What somebody thinks about."""
        self._before: Planning | None = None
        """What the planner knew before that."""
        self._answers: queue.SimpleQueue[tuple[Inquiry, Future[Any]]] = queue.SimpleQueue()
        self.part_of: Callable[[str], AbstractContextManager[None]] = _nobodys
        """Surrounds what is done for a device."""

    # ---- what holds now ----

    @property
    def is_busy(self) -> bool:
        """Whether other plans may hold soon."""
        return self._before is not None or bool(self._due)

    def is_open(self, device: str) -> bool:
        """Return whether somebody thinks about the plan of *device*, or about all plans."""
        asked = [] if self._asked is None else [self._asked]
        asked += [due for due in self._due if isinstance(due, Inquiry)]
        return any(device in question.devices or not question.devices for question in asked)

    @property
    def _now(self) -> Planning:
        return self._planner if self._before is None else self._before

    @property
    def plans(self) -> PlanSet | None:
        """See `Planning`."""
        return self._now.plans

    @property
    def is_fixed(self) -> bool:
        """See `Planning`."""
        return self._planner.is_fixed

    @property
    def importance(self) -> Mapping[str, float]:
        """See `Planning`."""
        return self._now.importance

    @property
    def first(self) -> int | None:
        """See `Planning`."""
        return self._now.first

    @property
    def server_ranks(self) -> dict[str, int] | None:
        """See `Planning`."""
        return self._now.server_ranks

    def is_known(self, device: str) -> bool:
        """Return whether a device has told what it offers."""
        return self._now.is_known(device)

    def plan_in_force(self, device: str) -> Plan | None:
        """Return the plan that a device has; None where nothing is planned for it."""
        return self._now.plan_in_force(device)

    def codec(self, device: str, plan: Plan) -> str:
        """Return how a device's hidden states and gradients travel under its plan."""
        return self._now.codec(device, plan)

    def copy(self) -> Planning:
        """Return what the planner knows now, for whoever writes it down in another thread."""
        return self._now.copy()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `Planning.state` returned, before anything was asked."""
        assert not self.is_busy
        self._planner.load_state(state)

    # ---- what changes little ----

    def stepped(self, device: str, num_tokens: int, compute_s: float) -> None:
        """Take in what a device computed in a step; see `Planning`."""
        self._note(_Note(device, lambda planner: planner.stepped(device, num_tokens, compute_s)))

    def missed(self, device: str) -> None:
        """Take note that a device missed a round; see `Planning`."""
        think: Callable[[Planning], None] = lambda planner: planner.missed(device)  # noqa: E731
        self.ask(Inquiry(think=think, then=_ignore, devices=(device,)))

    def _note(self, note: _Note) -> None:
        if self.is_busy:
            self._due.append(note)
        else:
            note.change(self._planner)

    # ---- what takes long ----

    def ask(self, question: Inquiry) -> None:
        """Let somebody think about *question* when all that was asked before is answered."""
        self._due.append(question)
        if self._begin():
            self._finish()  # where it was thought about at once

    def pump(self) -> None:
        """Hand answers on, and go on with what is due."""
        while self._finish() or self._begin():
            pass

    def close(self) -> None:
        """Wait for what is being thought about; nobody wants to know the answer."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> bool:
        """Begin with what has waited longest, if nobody thinks; return whether there was any."""
        if self._before is not None or not self._due:
            return False
        due = self._due.popleft()
        if isinstance(due, _Note):
            with self.part_of(due.device):
                due.change(self._planner)
            return True
        self._before, self._asked = self._planner.copy(), due

        def finished(done: Future[Any]) -> None:
            self._answers.put((due, done))
            self._wake()

        self._pool.submit(due.think, self._planner).add_done_callback(finished)
        return True

    def _finish(self) -> bool:
        """Hand an answer on; return whether there was one."""
        try:
            question, done = self._answers.get_nowait()
        except queue.Empty:
            return False
        before, self._before, self._asked = self._before, None, None
        assert before is not None
        if not question.fits(done.result() if done.exception() is None else None):
            self._planner.take_back(before)
            question.otherwise()
            return True
        own = self.part_of(*question.devices) if len(question.devices) == 1 else nullcontext()
        with own:
            question.then(done.result())
        return True
