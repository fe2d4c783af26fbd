"""Hidden states as changes: both sides hold the same bits, whatever one of them has lost."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.held_states import HeldStates
from edge_sdk.protocol import residual
from edge_sdk.protocol.codecs import Array, as_read
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import Activation, Stamp
from tests.edge_sdk.protocol.test_headers import through

WIDTH, LIMIT = 24, 10**6


def states(seed: int, rows: int, longest: int, drift: float = 0.0) -> Array:
    """Hidden states of some samples, moved by *drift*."""
    base = np.random.default_rng(seed).standard_normal((rows, longest, WIDTH), np.float32)
    move = np.random.default_rng(seed + 1).standard_normal(base.shape, np.float32)
    return base + np.float32(drift) * move


def sent(
    hidden_BTD: Array, lengths: list[int], samples: list[int], held: HeldStates
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """Code and send hidden states; return what arrives, and the starts."""
    tensors, starts = residual.code(hidden_BTD, lengths, samples, held)
    message = Activation(
        stamp=Stamp(), micro=0, num_micro=1, num_targets=1, samples=tuple(samples), starts=starts
    )
    due = {**tensors, "lengths": (np.array(lengths, np.int32), "int32")}
    envelope = through(OutgoingMessage(message, due, 256))
    assert envelope is not None
    return envelope.tensors, envelope.message.starts


def same(one: HeldStates, other: HeldStates, samples: Any) -> bool:
    """Whether both hold the same bytes of all *samples*."""
    return all(
        (a := one.get(sample)) is not None
        and (b := other.get(sample)) is not None
        and a.mark == b.mark
        and np.array_equal(a.array_TD, b.array_TD)
        for sample in samples
    )


@given(data=st.data())
def test_both_sides_hold_the_same_bits(data: st.DataObject) -> None:
    """Over many steps of any samples, lengths and changes, nobody holds other bytes."""
    device, coordinator = HeldStates(LIMIT), HeldStates(LIMIT)
    for step in range(data.draw(st.integers(1, 4))):
        samples = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
        lengths = [data.draw(st.integers(1, 7)) for _ in samples]
        hidden_BTD = states(step % 2, len(samples), max(lengths), step * 0.1)
        hidden_BTD *= np.float32(data.draw(st.sampled_from([0.0, 1e-20, 1.0, 1e6])))

        tensors, starts = sent(hidden_BTD, lengths, samples, device)
        found = residual.read(tensors, samples, starts, coordinator)

        assert found is not None
        assert found.shape == hidden_BTD.shape
        assert same(device, coordinator, samples)
        for row, length in enumerate(lengths):
            assert not found[row, length:].any()


def test_errors_do_not_add_up() -> None:
    """After ten epochs of states that move little, less is lost than of whole ones in 4 bits."""
    device, coordinator = HeldStates(LIMIT), HeldStates(LIMIT)
    lost = []
    for epoch in range(10):
        hidden_BTD = states(0, 4, 30, 0.02 * epoch)
        tensors, starts = sent(hidden_BTD, [30] * 4, [0, 1, 2, 3], device)
        found = residual.read(tensors, [0, 1, 2, 3], starts, coordinator)
        assert found is not None
        lost.append(np.square(found - hidden_BTD).sum() / np.square(hidden_BTD).sum())
        assert all(starts) == (epoch > 0)

    plain = np.square(as_read(hidden_BTD, "int4") - hidden_BTD).sum() / np.square(hidden_BTD).sum()
    assert lost[0] < 0.02
    assert max(lost[3:]) < plain / 10


def test_whoever_holds_nothing_asks_again() -> None:
    """A reader that lacks a start says so and holds what it held; whole ones help."""
    device, coordinator = HeldStates(LIMIT), HeldStates(LIMIT)
    sent(states(0, 2, 5), [5, 3], [0, 1], device)

    tensors, starts = sent(states(0, 2, 5, 0.1), [5, 3], [0, 1], device)
    lacks = residual.read(tensors, [0, 1], starts, coordinator)
    device.forget([0, 1])
    tensors, starts = sent(states(0, 2, 5, 0.1), [5, 3], [0, 1], device)
    found = residual.read(tensors, [0, 1], starts, coordinator)

    assert lacks is None
    assert starts == (0, 0)
    assert found is not None
    assert same(device, coordinator, [0, 1])


def test_a_start_of_another_time_is_no_start() -> None:
    """A reader that has gone back a step holds another mark, and does not add to the wrong one."""
    device, coordinator = HeldStates(LIMIT), HeldStates(LIMIT)
    for drift in (0.0, 0.1):
        tensors, starts = sent(states(0, 1, 5, drift), [5], [0], device)
        residual.read(tensors, [0], starts, coordinator)
    coordinator.roll_back()
    tensors, starts = sent(states(0, 1, 5, 0.2), [5], [0], device)

    assert residual.read(tensors, [0], starts, coordinator) is None


def test_other_blocks_states_are_sent_whole() -> None:
    """After a re-plan, or where a sample is another one, what is held is no help and not used."""
    device = HeldStates(LIMIT)
    sent(states(0, 2, 5), [5, 5], [0, 1], device)

    _, moved = sent(states(7, 2, 5), [5, 5], [0, 1], device)
    _, shorter = sent(states(7, 2, 5), [4, 5], [0, 1], device)

    assert moved == (0, 0)
    assert shorter[0] == 0 != shorter[1]


def test_what_has_no_room_is_sent_whole_each_time() -> None:
    """With room for one sample, it alone is sent as a change; both arrive."""
    room = 5 * WIDTH * 2 + 512
    device, coordinator = HeldStates(room), HeldStates(room)
    for drift in (0.0, 0.1, 0.2):
        tensors, starts = sent(states(0, 2, 5, drift), [5, 5], [0, 1], device)
        found = residual.read(tensors, [0, 1], starts, coordinator)
        assert found is not None

    assert (starts[0] > 0, starts[1]) == (True, 0)


WRONG: list[tuple[dict[str, Any], list[int], list[int], str]] = [
    ({}, [0], [0, 0], "1 samples and 2 starts"),
    ({}, [0, -1], [0, 0], "samples outside"),
    ({}, [0, 2**41], [0, 0], "samples outside"),
    ({"rest": np.zeros((1, 5, WIDTH), np.float32)}, [0, 1], [0, 0], "rest of shape"),
    ({"lengths": np.array([0, 5], np.int32)}, [0, 1], [0, 0], "lengths outside 1..5"),
    ({"lengths": np.array([6, 5], np.int32)}, [0, 1], [0, 0], "lengths outside 1..5"),
]


@pytest.mark.parametrize(("changes", "samples", "starts", "text"), WRONG)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], samples: list[int], starts: list[int], text: str
) -> None:
    """Rows, starts, lengths and rest that contradict each other are refused; nothing is held."""
    held = HeldStates(LIMIT)
    tensors = {
        "hidden": np.zeros((2, 5, WIDTH), np.float32),
        "rest": np.zeros((2, 5, WIDTH), np.float32),
        "lengths": np.array([5, 5], np.int32),
    }

    with pytest.raises(RemoteProtocolError, match=text):
        residual.read({**tensors, **changes}, samples, starts, held)

    assert len(held) == 0


def test_another_length_under_a_known_mark_is_refused() -> None:
    """A start has as many positions as its sequence; a sender that claims otherwise lies."""
    held = HeldStates(LIMIT)
    _, starts = residual.code(states(0, 1, 5), [5], [0], held)
    known = held.get(0)
    assert known is not None
    tensors = {
        "hidden": np.zeros((1, 4, WIDTH), np.float32),
        "lengths": np.array([4], np.int32),
    }

    with pytest.raises(RemoteProtocolError, match="other than before"):
        residual.read(tensors, [0], [known.mark], held)
