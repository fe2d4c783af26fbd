"""What the coordinator does with each message of a device, by the device's state: one table. Pure.

A pair that is not in the table breaks the protocol.
"""

from __future__ import annotations

from enum import Enum

from edge_sdk.client.states import MessageAction
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    Failure,
    Goodbye,
    Hello,
    PartRequest,
    Paused,
    Probe,
    Profiled,
    Ready,
    StepReport,
    TopGradient,
)


class DeviceState(Enum):
    """How far a device has come; the value goes on "the device ..."."""

    UNKNOWN = "has not said Hello"
    WELCOMED = "has no plan yet"
    ASSIGNED = "has a plan and has not said Ready, or was lost or told to run another plan since"
    READY = "waits for a round"
    MEMBER = "is in the round"


# What the device has yet to hear or say before it may send what is not in the table.
_FIRST = {
    DeviceState.UNKNOWN: "Hello",
    DeviceState.WELCOMED: "PlanAssigned",
}
_ALWAYS = dict.fromkeys((Hello, Goodbye, Failure), MessageAction.TAKE)
# A device that is lost for the round may still be on its way through it, or through one before.
_OF_A_ROUND = (Activation, TopGradient, StepReport, AdapterUpload)
_WELCOMED = {
    **_ALWAYS,
    **dict.fromkeys((PartRequest, Profiled, Probe), MessageAction.TAKE),
    **dict.fromkeys((*_OF_A_ROUND, EvalReport, Paused), MessageAction.SKIP),
}
_ASSIGNED = {**_WELCOMED, **dict.fromkeys((Ready, EvalReport, Paused), MessageAction.TAKE)}
ACTIONS: dict[DeviceState, dict[type, MessageAction]] = {
    DeviceState.UNKNOWN: _ALWAYS,
    DeviceState.WELCOMED: _WELCOMED,
    DeviceState.ASSIGNED: _ASSIGNED,
    DeviceState.READY: {**_ASSIGNED, Activation: MessageAction.TAKE},
    DeviceState.MEMBER: {**_ASSIGNED, **dict.fromkeys(_OF_A_ROUND, MessageAction.TAKE)},
}


def action_on(state: DeviceState, message: object) -> MessageAction:
    """Return what the coordinator does with *message* of a device in *state*.

    Raises:
        RemoteProtocolError: the device must not send it now.
    """
    action = ACTIONS[state].get(type(message))
    if action is None:
        raise RemoteProtocolError(f"{type(message).__name__} before {_FIRST[state]}")
    return action
