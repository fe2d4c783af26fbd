"""What a device does with each message of the coordinator, by its state: one table. Pure.

A pair that is not in the table breaks the protocol.
"""

from __future__ import annotations

from enum import Enum

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import (
    EvalResult,
    Failure,
    Gradient,
    PartData,
    Pause,
    PlanAssigned,
    Probe,
    Refused,
    Resend,
    RoundSkipped,
    RoundStart,
    RunOver,
    TopHidden,
    Welcome,
)


class State(Enum):
    """What a device is doing; the value goes on "the device ..."."""

    GREETING = "has said Hello"
    PROFILING = "finds out what it can offer"
    WAITING = "waits for its first plan"
    FETCHING = "fetches what its plan needs"
    READY = "waits for a round"
    TRAINING = "trains a round"
    MEASURING = "measures its link between two rounds"


class MessageAction(Enum):
    """What becomes of a message."""

    TAKE = "what is waited for"
    OBEY = "a new order: what is going on is given up for it"
    SKIP = "late: the answer to something that was given up, or overtaken by what comes"
    END = "the end of the session or the run"


ORDERS = (PlanAssigned, RoundStart, RoundSkipped, Pause)
_ALWAYS = {
    **dict.fromkeys((Refused, RunOver, Failure), MessageAction.END),
    **dict.fromkeys((Gradient, TopHidden, Resend, EvalResult), MessageAction.SKIP),
    **dict.fromkeys((Probe, PartData), MessageAction.SKIP),
    # The answer to a Hello before the last one: memory ran out while the device waited for it.
    Welcome: MessageAction.SKIP,
}
# For a device that was ready before: its next Ready brings it back into the rounds.
_LATE = dict.fromkeys((RoundStart, RoundSkipped, Pause), MessageAction.SKIP)
ACTIONS: dict[State, dict[type, MessageAction]] = {
    State.GREETING: {
        **_ALWAYS,
        **dict.fromkeys(ORDERS, MessageAction.SKIP),
        Welcome: MessageAction.TAKE,
    },
    # A plan that others made necessary is followed by one that knows what this device offers.
    State.PROFILING: {
        **_ALWAYS,
        **dict.fromkeys(ORDERS, MessageAction.SKIP),
        **dict.fromkeys((PartData, Probe), MessageAction.TAKE),
    },
    State.WAITING: {**_ALWAYS, **_LATE, PlanAssigned: MessageAction.TAKE},
    State.FETCHING: {
        **_ALWAYS,
        **_LATE,
        PlanAssigned: MessageAction.OBEY,
        PartData: MessageAction.TAKE,
    },
    State.READY: {**_ALWAYS, **dict.fromkeys(ORDERS, MessageAction.TAKE)},
    State.TRAINING: {
        **_ALWAYS,
        **dict.fromkeys(ORDERS, MessageAction.OBEY),
        **dict.fromkeys((Gradient, TopHidden, Resend, EvalResult), MessageAction.TAKE),
    },
    State.MEASURING: {
        **_ALWAYS,
        **dict.fromkeys(ORDERS, MessageAction.OBEY),
        Probe: MessageAction.TAKE,
    },
}


def action_on(state: State, message: object) -> MessageAction:
    """Return what a device in *state* does with *message*.

    Raises:
        RemoteProtocolError: the coordinator must not send it now.
    """
    action = ACTIONS[state].get(type(message))
    if action is None:
        raise RemoteProtocolError(f"{type(message).__name__} came while the device {state.value}")
    return action
