"""A device's record of what the coordinator knows of it, on the wire and on the disk."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.exchange import Known, finer, received, refined
from edge_sdk.lora.factors import Factors


def draw(seed: int, *sizes: int) -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


def pair(seed: int, rank: int = 2) -> Pair:
    """Factors of a weight of 6 x 5."""
    return Pair(draw(seed, rank, 5), draw(seed + 1, 6, rank))


def factors(seed: int, rank: int = 2) -> Factors:
    """A change of the same weight."""
    return Factors(draw(seed, 6, rank), draw(seed + 1, rank, 5))


def scale(_weight: str, rank: int) -> float:
    """The factor in front of B A."""
    return 4.0 / rank


def known_of() -> Known:
    """A device in the middle of a run."""
    known = Known("int8")
    known.begin({"w": pair(0)}, {"w": factors(2)})
    known.kept = 0.25
    return known


def test_what_rounding_loses_goes_up_in_the_next_round() -> None:
    """Told again and again of the same factors, the coordinator comes to know them."""
    known, own = known_of(), {"w": pair(10)}

    for _ in range(4):
        known.told(known.changes(own))

    for found, expected in zip(known.pairs["w"], own["w"], strict=True):
        assert np.abs(found - expected).max() < 1e-6


def test_the_residual_leaves_the_own_share_in() -> None:
    """All that was given, less what the device's own product has beyond its share."""
    known = known_of()

    (found,) = known.residual(scale).values()

    own = known.pairs["w"]
    expected = factors(2).dense() - 0.75 * 2.0 * own.b_OR @ own.a_RI
    np.testing.assert_allclose(found.dense(), expected, rtol=1e-4, atol=1e-5)


def test_what_was_given_keeps_within_its_ranks() -> None:
    """Changes are added as they are while there is room, and then at the least loss."""
    first, second = factors(0), factors(2)
    both = first.dense() + second.dense()

    roomy, tight = received(first, second, 4), received(first, second, 3)

    np.testing.assert_array_equal(roomy.a_RI, np.concatenate([first.a_RI, second.a_RI]))
    assert tight.rank == 3
    lost = np.linalg.norm(tight.dense() - both)
    assert lost == pytest.approx(np.linalg.svd(both)[1][3], rel=1e-3)


def test_a_restored_device_knows_the_same() -> None:
    """state() and load_state(), between other things in a checkpoint."""
    known = known_of()
    restored = Known("int8")

    restored.load_state({**known.state(), "own:w.A": draw(0, 2, 5)})

    assert restored.kept == known.kept
    for name in ("pairs", "received"):
        for one, two in zip(getattr(known, name)["w"], getattr(restored, name)["w"], strict=True):
            np.testing.assert_array_equal(one, two)


def test_own_factors_are_found_again_by_what_is_known_of_them() -> None:
    """After an upload a device's finer factors wait on its disk for these known ones."""
    known, own = {"w": pair(0)}, {"w": pair(2)}
    state = finer(own, known)

    np.testing.assert_array_equal(refined(known, state)["w"].a_RI, own["w"].a_RI)
    assert refined(known, {})["w"] is known["w"]
    smaller = {"w": pair(4, rank=1)}
    assert refined(smaller, state)["w"] is smaller["w"]


def test_what_was_not_told_is_added_to_other_factors() -> None:
    """A device that is moved keeps what rounding has left out, at once or back from its disk."""
    known, own, move = known_of(), {"w": pair(10)}, {"w": pair(20)}
    known.told(known.changes(own))
    told = known.pairs["w"]
    state = finer(own, known.pairs)

    found = known.move(own, move)

    for factor, now, was, fine, step in zip(
        found["w"], known.pairs["w"], told, own["w"], move["w"], strict=True
    ):
        np.testing.assert_array_equal(now, was + step)
        np.testing.assert_array_equal(factor, now + (fine - was))
        assert (fine != was).any()
    back = refined(known.pairs, state)
    assert all(map(np.array_equal, back["w"], found["w"]))
