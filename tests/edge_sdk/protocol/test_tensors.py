"""What a message must bring is said beside it, and what it brings is held against that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.deadline import Deadline
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import (
    MESSAGES,
    AdapterUpload,
    Gradient,
    PartData,
    Pause,
    RoundStart,
    Stamp,
    TopHidden,
)
from edge_sdk.protocol.tensors import TENSORS, check_shapes, check_tensors
from edge_sdk.transport.memory_link import memory_pair

START = RoundStart(stamp=Stamp(), end_step=1, is_full=True)
PART = PartData(stamp=Stamp(), sha256="0" * 64, offset=0, total_bytes=9)
TOP, GRADIENT = TopHidden(stamp=Stamp(), micro=0), Gradient(stamp=Stamp(), micro=0, loss_sum=0.0)


def floats(*shape: int) -> Any:
    """A tensor of zeros."""
    return np.zeros(shape, np.float32)


def factors(**changes: Any) -> dict[str, Any]:
    """Factors and residual of one weight, and a parameter; None leaves one out."""
    good = {"w.A": floats(2, 3), "w.B": floats(4, 2), "w.U": floats(4, 0), "w.V": floats(0, 3)}
    renamed = {name.replace("_", "."): value for name, value in changes.items()}
    tensors = {**good, "score": floats(7), **renamed}
    return {name: value for name, value in tensors.items() if value is not None}


WRONG = [
    (PART, {}, "PartData: tensor 'data': missing; due: uint8 (N)"),
    (PART, {"data": floats(9)}, "PartData: tensor 'data': float32 (9,), allowed: uint8 (N)"),
    (TOP, {"grad": floats(1, 2, 3)}, "TopHidden: tensor 'grad': not expected; allowed: 'hidden'"),
    (GRADIENT, {"grad": floats(6)}, "Gradient: tensor 'grad': float32 (6,), allowed: float32"),
    (Pause(stamp=Stamp()), {"x": floats(1)}, "Pause: tensor 'x': not expected; allowed: none"),
    (START, factors(w_B=None), "RoundStart: tensor 'w.B': missing beside 'w.A'"),
    (START, factors(w_U=None), "RoundStart: tensor 'w.U': missing beside 'w.V'"),
    (START, factors(w_B=floats(4, 3)), "'w.B': float32 (4, 3), allowed: float32 (O, R) or"),
    (START, factors(w_V=floats(0, 4)), "'w.V': float32 (0, 4), allowed: float32 (S, I) or"),
    (START, factors(score=np.zeros(7, np.int32)), "'score': int32 (7,), allowed: float32 (...)"),
    (AdapterUpload(stamp=Stamp()), {"w.A": floats(2)}, "'w.A': float32 (2,), allowed: float32 (R"),
]


@pytest.mark.parametrize(("message", "tensors", "text"), WRONG)
def test_a_wrong_tensor_is_named(message: Any, tensors: dict[str, Any], text: str) -> None:
    """The error says message, tensor, what came and what is allowed."""
    with pytest.raises(RemoteProtocolError) as caught:
        check_tensors(message, tensors)

    assert text in str(caught.value)


def test_weights_have_sizes_of_their_own() -> None:
    """A letter has one size among the tensors of one weight; another weight has its own."""
    other = {"v.A": floats(5, 8), "v.B": floats(9, 5)}

    check_tensors(START, {**factors(), **other})
    check_tensors(GRADIENT, {})
    check_tensors(GRADIENT, {"grad": floats(2, 3, 4)})


def test_whatever_arrives_is_checked_and_the_next_message_arrives() -> None:
    """Either side refuses on arrival what the other should not have sent."""
    device, coordinator = memory_pair()

    coordinator.send(PART)
    coordinator.send(Pause(stamp=Stamp()))
    device.send(AdapterUpload(stamp=Stamp()), {"w.A": (floats(2, 3), "float32")})

    with pytest.raises(RemoteProtocolError, match="PartData: tensor 'data': missing"):
        device.receive(Deadline.after(1.0))
    assert device.receive(Deadline.after(1.0)).message == Pause(stamp=Stamp())
    with pytest.raises(RemoteProtocolError, match="AdapterUpload: tensor 'w.B': missing"):
        coordinator.receive(Deadline.after(1.0))


def test_sizes_of_a_run_are_checked_by_name() -> None:
    """Exactly what a plan calls for, or a part of it where not all is needed."""
    shapes = {"a": (2, 3), "b": (4,)}

    check_shapes(START, {"a": floats(2, 3), "b": floats(4)}, shapes)
    check_shapes(START, {"a": floats(2, 3)}, shapes, needed=())
    for sent, text in (
        ({"a": floats(2, 3)}, r"RoundStart: tensor 'b': missing; due: \(4,\)"),
        ({"a": floats(2, 3), "b": floats(1)}, r"'b': \(1,\), allowed: \(4,\)"),
        ({"a": floats(2, 3), "b": floats(4), "c": floats(1)}, "'c': not expected; allowed: a, b"),
    ):
        with pytest.raises(RemoteProtocolError, match=text):
            check_shapes(START, sent, shapes)


def test_only_messages_declare_tensors() -> None:
    """Nothing declares tensors that is no message, and no ending hides a name."""
    assert set(TENSORS) <= set(MESSAGES.values())
    for declared in TENSORS.values():
        assert [one.name for one in declared if one.ending == ""] in ([], [declared[-1].name])
