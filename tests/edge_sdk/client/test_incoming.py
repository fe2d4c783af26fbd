"""A device sorts what it receives: answers, new orders, and ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edge_sdk.client.incoming import Inbox, Redirected, RunEnded, Stopped
from edge_sdk.client.states import ACTIONS, MessageAction, State, action_on
from edge_sdk.errors import EdgeError, NumericError, PeerGone, RefusedError, RemoteProtocolError
from edge_sdk.protocol.messages import (
    FROM_COORDINATOR,
    EvalResult,
    Failure,
    Goodbye,
    Gradient,
    Pause,
    PlanAssigned,
    Probe,
    Refused,
    RoundStart,
    RunOver,
    Stamp,
    Welcome,
)
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.transport.memory_link import MemoryLink, memory_pair

NOW = Stamp(run="r", round=1, step=7, attempt=2)
PLAN = Plan(split=1, ranks={}, alphas={}, batch_size=1, micro_batch=1)
RESULT = {"micro": 0, "loss_sum": 1.0, "num_targets": 1, "num_correct": 1}
WELCOME = Welcome(
    stamp=NOW,
    protocol=1,
    sdk_version="0",
    model_hash="",
    num_blocks=1,
    files=Part(name="files", sha256="0" * 64, num_bytes=0),
    task="causal-lm",
    labels="server",
    codec="float32",
    max_length=1,
    num_labels=0,
    vocab_size=1,
    pad_id=0,
    training={},
    lora={},
)
MESSAGES = {
    "Welcome": WELCOME,
    "RoundStart": RoundStart(stamp=NOW, end_step=9, is_full=False),
    "Pause": Pause(stamp=NOW),
}


@pytest.fixture
def ends() -> tuple[Inbox, MemoryLink, threading.Event]:
    """A device's inbox, the coordinator's end, and the application's stop."""
    device, coordinator = memory_pair()
    stop = threading.Event()
    return Inbox(device, stop, State.TRAINING), coordinator, stop


def gradient(micro: int = 0, stamp: Stamp = NOW) -> Gradient:
    """An answer."""
    return Gradient(stamp=stamp, micro=micro, loss_sum=0.0)


def test_stale_answers_are_skipped(ends: Any) -> None:
    """Only the answer with the stamp and micro-batch of the question counts."""
    inbox, coordinator, _ = ends
    old = Stamp(run="r", round=1, step=7, attempt=1)
    for message in (gradient(stamp=old), gradient(0), gradient(1)):
        coordinator.send(message)

    assert inbox.wait_for_reply(Gradient, NOW, 1).message == gradient(1)


@pytest.mark.parametrize(
    "order", [RoundStart(stamp=NOW, end_step=9, is_full=False), Pause(stamp=NOW)]
)
def test_a_new_order_ends_the_wait(ends: Any, order: Any) -> None:
    """An order in place of an answer is handed up, between two steps as well."""
    inbox, coordinator, _ = ends

    coordinator.send(order)
    with pytest.raises(Redirected) as caught:
        inbox.wait_for_reply(Gradient, NOW, 0)
    coordinator.send(order)
    with pytest.raises(Redirected):
        inbox.poll()

    assert caught.value.envelope.message == order


def test_an_order_ends_a_measurement_between_two_rounds(ends: Any) -> None:
    """It is handed up; before the first plan the answer behind it counts, and no stale one."""
    inbox, coordinator, _ = ends
    old, new = (
        Stamp(run="r", round=0, step=3, attempt=2),
        PlanAssigned(stamp=NOW, plan=PLAN, parts=()),
    )

    inbox.enter(State.MEASURING)
    coordinator.send(new)
    with pytest.raises(Redirected):
        inbox.wait_for_reply(Probe, NOW)
    inbox.enter(State.PROFILING)
    for message in (new, Probe(stamp=old), Probe(stamp=NOW)):
        coordinator.send(message)

    assert inbox.wait_for_reply(Probe, NOW).message == Probe(stamp=NOW)


def test_what_is_waited_for_is_found_among_what_is_late(ends: Any) -> None:
    """Answers to what was given up are skipped, and so is another kind than the one asked for."""
    inbox, coordinator, _ = ends
    for message in (gradient(), Probe(stamp=NOW), Pause(stamp=NOW)):
        coordinator.send(message)
    inbox.enter(State.READY)
    assert inbox.wait_for().message == Pause(stamp=NOW)

    inbox.enter(State.TRAINING)
    for message in (gradient(), EvalResult(stamp=NOW, **RESULT)):
        coordinator.send(message)

    assert inbox.wait_for(EvalResult).message == EvalResult(stamp=NOW, **RESULT)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("kind", FROM_COORDINATOR)
def test_every_message_has_its_states(state: State, kind: type) -> None:
    """Ends end in every state; a Welcome is taken in one, and like all else may come late."""
    if kind in (Refused, RunOver, Failure):
        assert ACTIONS[state][kind] is MessageAction.END
    elif kind is Welcome:
        awaited = state is State.GREETING
        assert ACTIONS[state][kind] is (MessageAction.TAKE if awaited else MessageAction.SKIP)
    else:
        assert kind in ACTIONS[state]


@pytest.mark.parametrize("state", [State.PROFILING, State.WAITING, State.FETCHING])
@pytest.mark.parametrize("kind", [RoundStart, Pause])
def test_an_order_to_a_device_that_was_ready_before_is_late(state: State, kind: type) -> None:
    """The coordinator may not have heard yet that the device begins anew."""
    assert ACTIONS[state][kind] is MessageAction.SKIP


def test_what_must_not_come_now_is_an_error() -> None:
    """The error names the message and what the device is doing."""
    message = Goodbye(stamp=NOW, reason="")

    with pytest.raises(RemoteProtocolError, match="Goodbye came while the device trains a round"):
        action_on(State.TRAINING, message)


def test_a_poll_does_not_wait(ends: Any) -> None:
    """With nothing there the device goes on."""
    ends[0].poll()


@pytest.mark.parametrize("look", ["wait_for", "poll"])
def test_the_application_may_stop_at_any_time(ends: Any, look: str) -> None:
    """A stop is noticed while waiting and between two steps."""
    inbox, _, stop = ends
    stop.set()

    with pytest.raises(Stopped):
        getattr(inbox, look)()


def test_a_stop_interrupts_a_wait(ends: Any) -> None:
    """A device that waits for the coordinator notices within one poll."""
    inbox, _, stop = ends
    timer = threading.Timer(0.05, stop.set)
    timer.start()

    with pytest.raises(Stopped):
        inbox.wait_for()
    timer.join()


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (Refused(stamp=NOW, reason="unknown key"), RefusedError, "unknown key"),
        (RunOver(stamp=NOW, reason="complete"), RunEnded, "complete"),
        (Failure(stamp=NOW, error="NumericError", text="NaN"), NumericError, "coordinator: NaN"),
        (Failure(stamp=NOW, error="Unheard", text="x"), EdgeError, "coordinator: x"),
        (Failure(stamp=NOW, error="INTERRUPTED_EXIT_CODE", text="x"), EdgeError, "x"),
        (Failure(stamp=NOW, error="annotations", text="x"), EdgeError, "x"),
    ],
)
@pytest.mark.parametrize("look", ["wait_for", "poll"])
def test_ends_are_exceptions(
    ends: Any, look: str, message: Any, error: type[Exception], text: str
) -> None:
    """What ends a session or a run is raised as what it is, wherever it arrives."""
    inbox, coordinator, _ = ends
    coordinator.send(message)

    with pytest.raises(error, match=text):
        getattr(inbox, look)()


def test_a_lost_link_is_raised(ends: Any) -> None:
    """When the other end is gone nobody waits."""
    inbox, coordinator, _ = ends
    coordinator.close()

    with pytest.raises(PeerGone):
        inbox.wait_for()
