"""How often a key may send what nobody has asked it for."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.rounds.intake.allowance import ASKS, LINES, RATES, Allowance
from edge_sdk.errors import RefusedError
from edge_sdk.protocol.messages import (
    FROM_COORDINATOR,
    FROM_DEVICE,
    PROTOCOL_VERSION,
    Activation,
    Goodbye,
    Hello,
    PlanAssigned,
    Ready,
    Stamp,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.supervise import MOST_KILLED, WINDOW_S

HELLO = Hello(stamp=Stamp(), protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",))
READY = Ready(stamp=Stamp(), vocab_size=9, num_samples=9, held_steps=())
PLAN = PlanAssigned(
    stamp=Stamp(), plan=Plan(split=1, ranks={}, alphas={}, batch_size=2, micro_batch=2), parts=()
)
HELLOS_OF_A_START = 2


class Clock:
    """A clock that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def num_taken(allowance: Allowance, message: Any, tries: int, device: str = "a") -> int:
    """Return how many of *tries* are taken before one is refused."""
    for number in range(tries):
        try:
            allowance.take(device, message)
        except RefusedError:
            return number
    return tries


def test_a_key_that_greets_without_end_is_refused() -> None:
    """Of 57,000 greetings at once as many are answered as the rate says, and other keys' all."""
    allowance = Allowance(Clock())

    assert num_taken(allowance, HELLO, 57_000) == RATES[Hello].burst
    assert num_taken(allowance, HELLO, 5, "b") == 5
    with pytest.raises(RefusedError, match="more than 60 Hello that nobody asked for"):
        allowance.take("a", HELLO)


def test_who_waits_may_send_again() -> None:
    """One more is taken after each period of the rate, and never more than a burst."""
    clock = Clock()
    allowance = Allowance(clock)
    num_taken(allowance, HELLO, 1000)

    clock.now_s += 3 * RATES[Hello].every_s
    assert num_taken(allowance, HELLO, 1000) == 3
    clock.now_s += 1e9
    assert num_taken(allowance, HELLO, 1000) == RATES[Hello].burst


def test_an_honest_device_is_never_refused() -> None:
    """A program that is killed as often as a supervisor starts it again may greet each time."""
    clock = Clock()
    allowance = Allowance(clock)

    for _ in range(3):  # three whole windows of deaths, the deaths of each within its first seconds
        assert num_taken(allowance, HELLO, HELLOS_OF_A_START * MOST_KILLED) == 2 * MOST_KILLED
        clock.now_s += WINDOW_S


def test_what_was_asked_for_is_free() -> None:
    """Any number of plans may be answered at once, each by one Ready."""
    allowance = Allowance(Clock())

    for _ in range(10 * RATES[Ready].burst):
        allowance.asked("a", PLAN)
        allowance.take("a", READY)
    assert num_taken(allowance, READY, 1000) == RATES[Ready].burst


def test_what_trains_is_not_counted() -> None:
    """Only messages that a device sends now and then have a rate; all are real messages."""
    allowance = Allowance(Clock())
    work = Activation(stamp=Stamp(), micro=0, num_micro=1, num_targets=1)

    assert num_taken(allowance, work, 100_000) == 100_000
    assert set(FROM_DEVICE) > RATES.keys() >= {Hello, Ready, Goodbye}
    assert set(FROM_COORDINATOR) > ASKS.keys()
    assert all(RATES.keys() >= set(asked) for asked in ASKS.values())


def test_lines_about_a_device_have_a_budget() -> None:
    """What a device does wrong fills no log."""
    allowance = Allowance(Clock())

    assert sum(allowance.may_tell("a") for _ in range(10_000)) == LINES.burst
    assert allowance.may_tell("b")
