"""A message that nobody knew before travels, once it is declared, listed and has its states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from edge_sdk.client.states import ACTIONS, MessageAction, State, action_on
from edge_sdk.deadline import Deadline
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import FROM_COORDINATOR, MESSAGES, Stamp
from edge_sdk.protocol.tensors import TENSORS, Tensor
from edge_sdk.transport import memory_link


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What the coordinator would do. Coordinator -> device."""

    stamp: Stamp
    steps: dict[str, int]
    """Steps by device."""


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the lists and tables for the time of a test."""
    monkeypatch.setattr(memory_link, "FROM_COORDINATOR", (*FROM_COORDINATOR, Hint))
    monkeypatch.setitem(MESSAGES, "Hint", Hint)
    monkeypatch.setitem(TENSORS, Hint, (Tensor("advice", "B T"),))
    monkeypatch.setitem(ACTIONS, State.READY, {**ACTIONS[State.READY], Hint: MessageAction.TAKE})


def test_it_travels_with_its_tensor_and_is_checked() -> None:
    """It arrives as it was sent; without its tensor, or in another state, it is refused."""
    device, coordinator = memory_link.memory_pair()
    hint, advice_BT = Hint(stamp=Stamp(step=3), steps={"a": 2}), np.ones((2, 5), np.float32)

    coordinator.send(hint, {"advice": (advice_BT, "float32")})
    coordinator.send(hint)
    envelope = device.receive(Deadline.after(1.0))

    assert envelope.message == hint
    np.testing.assert_array_equal(envelope.tensors["advice"], advice_BT)
    with pytest.raises(RemoteProtocolError, match="Hint: tensor 'advice': missing"):
        device.receive(Deadline.after(1.0))
    assert action_on(State.READY, hint) is MessageAction.TAKE
    with pytest.raises(RemoteProtocolError, match="Hint came while the device trains a round"):
        action_on(State.TRAINING, hint)
