"""One thread that computes, so that the event loop never does."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from coordinator.engine.interface import ComputeFailed
from edge_sdk.errors import EdgeError, is_out_of_memory

T = TypeVar("T")
Told = Callable[[str, Sequence[str], float], None]
"""Takes what was computed, for which devices, and the seconds that it took."""


def _ignore(_what: str, _devices: Sequence[str], _seconds: float) -> None:
    """Tell nobody."""


def owned(
    error: Exception, devices: Sequence[str], works_alone: Callable[[str], bool]
) -> Exception:
    """Return *error* as that of the one device whose part is the reason, where there is one.

    Args:
        error: What a computation on what *devices* have sent has raised.
        devices: Their names.
        works_alone: Whether the computation works for the part of a device alone.
    """
    if isinstance(error, (EdgeError, OSError)) or is_out_of_memory(error):
        return error
    failing = [device for device in devices if not works_alone(device)]
    if not failing or 1 < len(devices) == len(failing):
        return error
    return ComputeFailed(failing[0], error)


class Inline(Executor):
    """Computes where it is asked to: for runs whose order must not depend on threads."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return what *fn* has made."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed on, as by any pool
            future.set_exception(error)
        return future


class Worker:
    """Runs one computation at a time; results are collected by the event loop.

    Args:
        wake: Interrupts the event loop's wait when a result is there; called from any thread.
        pool: Where it computes; None: in a thread of its own.
        told: Hears, in the event loop's thread, of what was computed, where that has a name.
    """

    def __init__(
        self, wake: Callable[[], None], pool: Executor | None = None, told: Told = _ignore
    ) -> None:
        self._has_thread = pool is None
        self._pool = pool or ThreadPoolExecutor(1, "compute")
        self._wake, self._told = wake, told
        self._done: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], None]]] = (
            queue.SimpleQueue()
        )
        self.is_busy = False
        self._name: tuple[str, Sequence[str]] = "", ()
        self._seconds = 0.0

    def start(
        self,
        compute: Callable[[], Any],
        then: Callable[[Any], None],
        what: str = "",
        devices: Sequence[str] = (),
    ) -> None:
        """Begin a computation.

        Args:
            compute: What to do.
            then: Gets its result in the event loop's thread.
            what: Its name for those who look on; empty: nobody is told of it.
            devices: Whose part it is.
        """
        assert not self.is_busy, "one computation at a time"
        self.is_busy, self._name = True, (what, devices)

        def timed() -> Any:
            began_s = time.monotonic()
            try:
                return compute()
            finally:
                self._seconds = time.monotonic() - began_s

        future = self._pool.submit(timed)

        def finished(done: Future[Any]) -> None:
            self._done.put((done, then))
            self._wake()

        future.add_done_callback(finished)

    def at_once(self, compute: Callable[[], T]) -> T:
        """Compute in that thread and wait: for what comes before the event loop begins."""
        return self._pool.submit(compute).result() if self._has_thread else compute()

    def collect(self) -> None:
        """Hand finished results on; what a computation raised is raised here."""
        while True:
            try:
                future, then = self._done.get_nowait()
            except queue.Empty:
                return
            self.is_busy = False
            if self._name[0]:
                self._told(*self._name, self._seconds)
            then(future.result())

    def close(self) -> None:
        """Wait for what is being computed."""
        self._pool.shutdown()
