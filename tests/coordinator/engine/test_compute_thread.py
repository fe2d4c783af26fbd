"""Computations run beside the event loop and come back into it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from coordinator.engine.compute_thread import Inline, Worker
from edge_sdk.errors import NumericError


@pytest.fixture
def woken() -> threading.Event:
    """Set when a worker wakes the event loop."""
    return threading.Event()


def test_a_result_is_handed_on_in_the_caller_s_thread(woken: threading.Event) -> None:
    """The computation runs elsewhere, its result arrives here when it is collected."""
    worker, threads = Worker(woken.set), []

    worker.start(threading.get_ident, lambda found: threads.extend([found, threading.get_ident()]))
    was_busy = worker.is_busy
    assert woken.wait(10)
    assert not threads
    worker.collect()

    assert was_busy
    assert not worker.is_busy
    assert threads[0] != threads[1] == threading.get_ident()
    worker.close()


def test_an_error_is_raised_where_it_is_collected(woken: threading.Event) -> None:
    """What a computation raises reaches the event loop, and the worker goes on."""
    worker, results = Worker(woken.set), []

    def fail() -> None:
        raise NumericError("NaN")

    worker.start(fail, results.append)
    assert woken.wait(10)
    with pytest.raises(NumericError, match="NaN"):
        worker.collect()
    woken.clear()
    worker.start(lambda: 3, results.append)
    assert woken.wait(10)
    worker.collect()

    assert results == [3]
    worker.close()


def test_a_result_may_start_the_next_computation(woken: threading.Event) -> None:
    """What takes a result over may begin another computation at once."""
    worker, results = Worker(woken.set), []
    again = threading.Event()

    def then(found: int) -> None:
        results.append(found)
        if found == 1:
            worker.start(lambda: again.set() or 2, then)

    worker.start(lambda: 1, then)
    while len(results) < 2:
        assert woken.wait(10)
        woken.clear()
        worker.collect()

    assert results == [1, 2]
    worker.close()


def test_collecting_nothing_is_nothing(woken: threading.Event) -> None:
    """Collecting while nothing is done returns at once."""
    worker = Worker(woken.set)

    worker.collect()

    assert not worker.is_busy
    worker.close()


def test_what_has_a_name_is_told_with_its_seconds() -> None:
    """Those who look on hear of it once it is done, before anything follows."""
    told: list[Any] = []
    worker = Worker(lambda: None, Inline(), lambda *what: told.append(what))

    worker.start(lambda: 1, told.append, "wave", ["a"])
    worker.collect()
    worker.start(lambda: 2, told.append)
    worker.collect()

    (what, devices, seconds), *results = told
    assert (what, devices, results) == ("wave", ["a"], [1, 2])
    assert 0.0 <= seconds < 60.0
