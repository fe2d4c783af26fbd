"""Labels that stay on a device: what it says of their number gains it nothing."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.rounds.step.top_gradients import TopGradients
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.plan import Place

SHAPE, NAMES = (20, 8), "abcd"
NUM_MICRO = dict.fromkeys(NAMES, 2)


def grad(seed: int, targets: int, said: int) -> Array:
    """The gradient of a mean over so many targets, of which the device says another number."""
    rows = np.random.default_rng(seed).normal(size=SHAPE)
    rows[targets:] = 0.0
    return np.asarray(rows / said, np.float32)


def wave(micro: int, said: int = 20) -> dict[Place, Array]:
    """A wave of four devices with twenty targets each, of which the last says what it likes."""
    return {
        (name, micro): grad(10 * micro + seed, 20, said if name == "d" else 20)
        for seed, name in enumerate(NAMES)
    }


def size(array: Array) -> float:
    """Sum of the norms of the rows."""
    return float(np.linalg.norm(array.astype(np.float64), axis=-1).sum())


def test_honest_gradients_are_not_touched() -> None:
    """All in the same range, with many targets or few, however the loss falls: bit for bit."""
    gradients = TopGradients(4.0)
    for step in range(5):
        for micro in range(2):
            sent = wave(micro)
            sent["a", micro] = grad(step, 1, 1)  # one target: the largest there is
            sent = {place: array * np.float32(0.5**step) for place, array in sent.items()}

            found = gradients.bounded(step, sent, NUM_MICRO)

            assert all(found[place] is sent[place] for place in sent)


@pytest.mark.parametrize("said", [1, 2])
def test_a_smaller_number_of_targets_gains_nothing(said: int) -> None:
    """Of 20 targets it says 1 or 2: a step counts with no more than four medians of the others."""
    gradients = TopGradients(4.0)
    for step in range(3):
        first = gradients.bounded(step, wave(0, said), NUM_MICRO)
        second = gradients.bounded(step, wave(1, said), NUM_MICRO)

        own = size(first["d", 0]) + size(second["d", 1])
        others = np.median([size(first[n, 0]) + size(second[n, 1]) for n in "abc"])
        assert own <= 4.2 * others
        assert first["a", 0] is not None
        np.testing.assert_array_equal(first["b", 0], wave(0)["b", 0])


@pytest.mark.parametrize("number", [1e6, 3e38])
def test_no_number_is_too_large(number: float) -> None:
    """Gradients of any size are scaled down, and do not spoil what is known of the others."""
    gradients = TopGradients(4.0)
    sent = wave(0)
    sent["d", 0] = np.full(SHAPE, number, np.float32)

    found = gradients.bounded(0, sent, NUM_MICRO)
    after = gradients.bounded(1, wave(0), NUM_MICRO)

    assert size(found["d", 0]) <= 4.2 * 2 * size(sent["a", 0])
    assert all(after[name, 0] is not None for name in NAMES)
    np.testing.assert_array_equal(after["a", 0], wave(0)["a", 0])


def test_what_is_known_outlives_a_restart() -> None:
    """From a checkpoint the bound is what it was."""
    one, two = TopGradients(4.0), TopGradients(4.0)
    for micro in range(2):
        one.bounded(0, wave(micro), NUM_MICRO)
    two.load_state(one.state())

    sent = wave(0, said=1)
    first, second = (known.bounded(1, sent, NUM_MICRO) for known in (one, two))

    for place in sent:
        np.testing.assert_array_equal(first[place], second[place])


def test_few_devices_and_a_factor_of_0_bound_nothing() -> None:
    """Of two nobody can tell who is wrong; and 0 is off."""
    sent = {place: array for place, array in wave(0, 1).items() if place[0] in "ad"}
    assert TopGradients(4.0).bounded(0, sent, NUM_MICRO)["d", 0] is sent["d", 0]
    assert TopGradients(0.0).bounded(0, wave(0, 1), NUM_MICRO).keys() == wave(0).keys()
