"""The event loop of a run: messages in (`handlers.py`), decisions carried out (`executor.py`).

What to do next is decided in `state.py`, who may take part in `admission.py`, what is computed in
`engine/local.py` (in a thread of its own), what is joined in `aggregation/ledger.py`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import suppress

from coordinator.engine.compute_thread import Worker
from coordinator.results.events import RunFinished, RunStarted, StopAsked
from coordinator.rounds.executor import COMPLETED, RoundExecutor
from coordinator.rounds.handlers import MessageHandler
from coordinator.rounds.run import Run
from edge_sdk.deadline import Deadline
from edge_sdk.errors import PeerGone

# Seconds after which the loop comes round at the latest, to notice silence and Ctrl-C.
POLL_S = 0.5
# Seconds for the last words to all devices.
GOODBYE_S = 10.0


class Coordinator:
    """One run, from its first device to its last round.

    Args:
        run: What it consists of.
        pool: Where it computes; None: in a thread of its own.
    """

    def __init__(self, run: Run, pool: Executor | None = None) -> None:
        self._run = run
        self._worker = Worker(run.gateway.wake, pool)
        self._handlers = MessageHandler(run)
        self._executor = RoundExecutor(run, self._handlers, self._worker)
        self._has_told = False

    def serve(self) -> str:
        """Serve until the run is over or `stop` was called; return how it ended."""
        run, executor = self._run, self._executor
        if not run.folder.checkpoints():
            executor.end_row({}, executor.measure(0))
            run.save()
        run.watcher.see(RunStarted(run.id, run.state.step))
        try:
            while not executor.outcome:
                for event in run.gateway.events(POLL_S):
                    self._handlers.handle(event)
                self._handlers.assign_waiting()
                executor.collect()
                self._tell_of_stop()
                executor.advance()
        finally:
            self._worker.close()
            run.model.graphs.close()
        run.watcher.see(RunFinished(executor.outcome))
        if executor.outcome == COMPLETED:
            self._say_goodbye()
        return executor.outcome

    def _tell_of_stop(self) -> None:
        """Say once that a stop was asked for."""
        if self._executor.stop_asked and not self._has_told:
            self._has_told = True
            self._run.watcher.see(StopAsked())

    def _say_goodbye(self) -> None:
        """End all sessions, once everybody knows that the run is over.

        After a pause there is no goodbye: devices keep trying, and join the run that is resumed.
        """
        gateway, deadline = self._run.gateway, Deadline.after(GOODBYE_S)
        names = gateway.devices()
        for name in names:
            with suppress(PeerGone):
                gateway.drop(name, COMPLETED)
        while not set(names).isdisjoint(gateway.devices()) and deadline.left_s():
            gateway.events(min(POLL_S, deadline.left_s()))

    def stop(self) -> None:
        """Leave at the end of the step, with a checkpoint; any thread may call this."""
        self._executor.stop_asked = True
        self._run.gateway.wake()
