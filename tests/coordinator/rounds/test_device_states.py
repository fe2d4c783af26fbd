"""What a device may send follows from how far it has come."""

from __future__ import annotations

import pytest

from coordinator.rounds.device_states import ACTIONS, DeviceState, action_on
from edge_sdk.client.states import MessageAction
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import (
    FROM_DEVICE,
    Activation,
    AdapterUpload,
    EvalReport,
    Hello,
    PartRequest,
    Ready,
    Stamp,
    StepReport,
    TopGradient,
)

MESSAGES = {
    "Hello": Hello(stamp=Stamp(), protocol=1, sdk_version="0", codecs=()),
    "PartRequest": PartRequest(stamp=Stamp(), sha256="0" * 64, offset=0),
    "Ready": Ready(stamp=Stamp(), vocab_size=1, num_samples=1, held_steps=()),
    "Activation": Activation(stamp=Stamp(), micro=0, num_micro=1, num_targets=1),
    "AdapterUpload": AdapterUpload(stamp=Stamp()),
}


@pytest.mark.parametrize(
    ("state", "message", "text"),
    [
        (DeviceState.UNKNOWN, "PartRequest", "PartRequest before Hello"),
        (DeviceState.UNKNOWN, "Activation", "Activation before Hello"),
        (DeviceState.WELCOMED, "Ready", "Ready before PlanAssigned"),
    ],
)
def test_what_comes_too_early_is_an_error(state: DeviceState, message: str, text: str) -> None:
    """The error names the message, and what has to come before it."""
    with pytest.raises(RemoteProtocolError, match=text):
        action_on(state, MESSAGES[message])


@pytest.mark.parametrize("kind", [Activation, TopGradient, StepReport, AdapterUpload, EvalReport])
def test_what_comes_too_late_is_no_error(kind: type) -> None:
    """A device that said Hello, and was moved or lost since, may be on its way through a round."""
    assert ACTIONS[DeviceState.WELCOMED][kind] is MessageAction.SKIP
    assert kind in ACTIONS[DeviceState.ASSIGNED]
    assert kind in ACTIONS[DeviceState.READY]
    assert kind not in ACTIONS[DeviceState.UNKNOWN]


def test_a_device_may_begin_anew_at_any_time_and_a_member_may_send_all() -> None:
    """Hello is taken in every state, everything from a member, and nothing else is known."""
    for state in DeviceState:
        assert action_on(state, MESSAGES["Hello"]) is MessageAction.TAKE
        assert set(ACTIONS[state]) <= set(FROM_DEVICE)
    assert ACTIONS[DeviceState.MEMBER] == dict.fromkeys(FROM_DEVICE, MessageAction.TAKE)
