"""One thread that computes, so that the event loop never does."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any


class Worker:
    """Runs one computation at a time; results are collected by the event loop.

    Args:
        wake: Interrupts the event loop's wait when a result is there; called from any thread.
        pool: Where it computes; None: in a thread of its own.
    """

    def __init__(self, wake: Callable[[], None], pool: Executor | None = None) -> None:
        self._pool = pool or ThreadPoolExecutor(1, "compute")
        self._wake = wake
        self._done: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], None]]] = (
            queue.SimpleQueue()
        )
        self.is_busy = False

    def start(self, compute: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Begin *compute*; *then* gets its result in the event loop's thread."""
        assert not self.is_busy, "one computation at a time"
        self.is_busy = True
        future = self._pool.submit(compute)

        def finished(done: Future[Any]) -> None:
            self._done.put((done, then))
            self._wake()

        future.add_done_callback(finished)

    def collect(self) -> None:
        """Hand finished results on; what a computation raised is raised here."""
        while True:
            try:
                future, then = self._done.get_nowait()
            except queue.Empty:
                return
            self.is_busy = False
            then(future.result())

    def close(self) -> None:
        """Wait for what is being computed."""
        self._pool.shutdown()
