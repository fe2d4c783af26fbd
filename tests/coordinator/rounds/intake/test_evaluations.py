"""Micro-batches that devices want to have evaluated."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.engine.interface import Job
from coordinator.rounds.intake.evaluations import MOST_WAITING, Evaluations
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import Activation, Stamp


def message(micro: int) -> Activation:
    """A micro-batch of an evaluation."""
    return Activation(stamp=Stamp(), micro=micro, num_micro=1, num_targets=1, is_eval=True)


def job(device: str) -> Job:
    """What is to be computed of it."""
    hidden = np.zeros((1, 2, 3), np.float32)
    return Job(device, 1, 1.0, 1, hidden, np.full(1, 2, np.int32), None)


def test_each_device_has_its_turn() -> None:
    """Whoever sends more waits longer, and nobody waits for it."""
    due = Evaluations()
    for device in "ab":
        due.begin(device)
    due.add(message(0), job("a"))
    due.add(message(1), job("a"))
    due.add(message(0), job("b"))

    first, second = due.take(), due.take()

    assert [one.device for _, one in first] == ["a", "b"]
    assert [one.device for _, one in second] == ["a"]
    assert not due


def test_a_micro_batch_is_evaluated_once() -> None:
    """One that comes again, or out of its turn, breaks the protocol."""
    due = Evaluations()
    due.begin("a")
    due.add(message(0), job("a"))

    for micro in (0, 2, -1):
        with pytest.raises(RemoteProtocolError, match="due is 1"):
            due.add(message(micro), job("a"))


def test_no_device_fills_the_queue() -> None:
    """Of 16,600 micro-batches that nobody waits to be answered, two are kept."""
    due = Evaluations()
    due.begin("a")
    for micro in range(MOST_WAITING):
        due.add(message(micro), job("a"))

    with pytest.raises(RemoteProtocolError, match="at once"):
        due.add(message(MOST_WAITING), job("a"))


def test_it_is_due_from_the_order_to_the_report() -> None:
    """Before it is told to, after its report, and once it has left, a device evaluates nothing."""
    due = Evaluations()
    assert not due.is_due("a")
    due.begin("a")
    assert due.is_due("a")
    due.end("a")
    assert not due.is_due("a")
    due.begin("a")
    due.add(message(0), job("a"))
    due.forget("a")
    assert not due.is_due("a")
    assert not due
