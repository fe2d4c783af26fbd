"""Whose uploads are left out: whoever has brought what cannot be, or what nobody else is like."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from statistics import median

import numpy as np
import pytest

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.screening import Brought, Diverged, Moves, Screening
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import LoraConfig, Shape
from edge_sdk.runtime.training import TrainingConfig

SHAPE, STEPS, TOTAL, ROUND = Shape(48, 32), 10, 100, 9
LORA = LoraConfig(r=4, lora_alpha=8)
RATE = 1e-3
MEASURE = "beyond all measure"


def screening(**training: object) -> Screening:
    """What a run holds uploads against, with the default factor."""
    settings = {"learning_rate": RATE, "lr_scheduler_type": "constant", **training}
    return Screening(TrainingConfig(**settings), STEPS, TOTAL, "float32", LORA.scale, factor=10.0)


def brought(held: Screening, number: float, seed: int = 0, rank: int = 4) -> Brought:
    """A device whose numbers have all moved by *number*, in directions of its own."""
    before = initial_pair("w", rank, SHAPE, seed=0)
    signs = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        after = Pair(
            *(
                (array + number * signs.choice([-1.0, 1.0], array.shape)).astype(np.float32)
                for array in before
            )
        )
    return held.brought(Report(2, 8, {"w": after}), ROUND, {"w": before}, {})


def screen(held: Screening, numbers: Mapping[str, float], *, is_retry: bool = False):  # type: ignore[no-untyped-def]
    """Who is refused of devices that have moved so far."""
    found = {n: brought(held, x, seed) for seed, (n, x) in enumerate(numbers.items())}
    return held.screen(found, is_retry=is_retry)


@pytest.mark.parametrize("number", [1.0, 10.0, 1e3, 1e12, 1e19, 1e30, 3.3e38, -3.3e38])
def test_what_cannot_be_is_the_senders(number: float) -> None:
    """Only the device whose numbers they are is named, however large they are."""
    refused = screen(screening(), {"a": 0.005, "b": number, "c": 0.004})

    assert list(refused.proven) == ["b"]
    assert MEASURE in refused.proven["b"]
    assert not refused.unlike


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_the_senders_once(number: float) -> None:
    """One is named; several at once are nobody's fault, until the round is tried again."""
    assert list(screen(screening(), {"a": 0.005, "b": number}).proven) == ["b"]
    several = {"a": 0.005, "b": number, "c": number}

    with pytest.raises(Diverged, match="several devices at once"):
        screen(screening(), several)
    assert list(screen(screening(), several, is_retry=True).proven) == ["b", "c"]


def test_nobody_is_left() -> None:
    """Where no upload can be used the devices are not to blame; alone a device is."""
    with pytest.raises(Diverged, match="no upload of the round can be used"):
        screen(screening(), {"a": 3.0, "b": 5.0})
    assert list(screen(screening(), {"a": 3.0}).proven) == ["a"]


def test_a_rate_that_is_too_high_blames_nobody() -> None:
    """Uploads that the optimizer can have made, and that are beyond all measure: it has."""
    held = screening(learning_rate=30.0)

    with pytest.raises(Diverged, match=r"diverged.*lower training\.learning_rate"):
        screen(held, {"a": 200.0, "b": 300.0, "c": 0.1})
    with pytest.raises(Diverged, match="diverged"):
        screen(held, {"a": 200.0})
    refused = screen(held, {"a": 200.0, "b": 1.0, "c": 0.1})
    assert list(refused.unlike) == ["a"]
    assert MEASURE in refused.unlike["a"]


def test_what_is_unlike_the_others_is_left_out() -> None:
    """More than ten times the median of the others, where AdamW can just have done it."""
    usual = {"a": 0.002, "b": 0.0021, "c": 0.0019}

    refused = screen(screening(), {**usual, "d": 0.03})

    assert list(refused.unlike) == ["d"]
    assert "times as far as those of the others" in refused.unlike["d"]
    assert not refused.proven


@pytest.mark.parametrize("number", [0.0, 1e-5, 0.0149])
def test_a_likely_step_is_left_out_by_nothing(number: float) -> None:
    """Up to 1.5 learning rates a step are no reason, whatever the others do; nor is too little."""
    for usual in (0.0, 1e-6, 0.005):
        refused = screen(screening(), {"a": usual, "b": usual, "c": number})

        assert not refused.devices


def test_two_devices_are_not_compared() -> None:
    """Of two that differ nobody can tell which one is wrong."""
    assert not screen(screening(), {"a": 0.0001, "b": 0.03}).devices


@pytest.mark.parametrize("rank", [1, 16])
def test_sgd_without_clipping_is_held_against_the_others(rank: int) -> None:
    """Nothing bounds it but the others; ranks and scales make no difference."""
    held = screening(optimizer="sgd", max_grad_norm=0.0, learning_rate=1.0)

    def honest(rank: int, seed: int, size: float = 0.01) -> Brought:
        before = initial_pair("w", rank, SHAPE, seed=0)
        gradient = np.random.default_rng(seed).normal(size=SHAPE) * size
        b_OR = -STEPS * LORA.scale("w", rank) * gradient @ before.a_RI.T
        after = Pair(before.a_RI, b_OR.astype(np.float32))
        return held.brought(Report(2, 8, {"w": after}), ROUND, {"w": before}, {})

    found = {"a": honest(4, 1), "b": honest(4, 2), "c": honest(rank, 3)}
    assert not held.screen(found, is_retry=False).devices

    found["d"] = honest(rank, 4, size=1.0)
    assert list(held.screen(found, is_retry=False).unlike) == ["d"]


PLAIN = screening(optimizer="sgd", max_grad_norm=0.0)
"""What is compared with others alone."""


def moved(seed: int, num_devices: int, num_weights: int, scatter: float) -> dict[str, Moves]:
    """How far honest devices went, whose weights are as unlike as those of a model.

    Logarithms of each weight scatter, and half as much those of whole devices.
    """
    draw = np.random.default_rng([seed, num_devices, num_weights])
    usual = draw.normal(0.0, 2.0, num_weights)
    logs = usual + scatter * draw.normal(size=(num_devices, num_weights))
    logs += scatter / 2 * draw.normal(size=(num_devices, 1))
    return {
        f"d{n}": {f"w{w}": float(x) for w, x in enumerate(np.exp(r))} for n, r in enumerate(logs)
    }


def times_as_far(moves: Moves, times: float, weights: int | None = None) -> Moves:
    """The same, with the first *weights* of them that many times as far."""
    changed = list(moves)[:weights]
    return {w: x * times if w in changed else x for w, x in moves.items()}


def test_honest_devices_scatter_and_hostile_ones_are_seen() -> None:
    """Whether rounds scatter little or much, and devices and weights are few or many.

    Some honest devices go more than 10 times as far in one weight; none is left out. A whole update
    that is 100 times as far is, and one in which a single weight is 1000 times.
    """
    beyond = 0
    for fleet in product(range(6), (3, 4, 6, 10), (7, 70), (0.1, 0.3, 0.6)):
        honest = moved(*fleet)
        for device, own in honest.items():
            others = {name: moves for name, moves in honest.items() if name != device}
            assert not PLAIN.unlike(device, honest)
            beyond += any(own[w] > 10.0 * median(m[w] for m in others.values()) for w in own)
            for bad in (times_as_far(own, 100.0), times_as_far(own, 1000.0, 1)):
                assert PLAIN.unlike(device, {**others, device: bad})
    assert beyond > 0


def test_a_round_that_has_happened() -> None:
    """Three honest devices after a step of three rows: one weight is 10.3 times as far."""
    weights = ("down", "gate", "up", "k", "o", "q", "v")
    found = {
        "a": (8.984e-4, 1.018e-3, 1.039e-3, 6.419e-5, 8.782e-3, 8.212e-5, 9.875e-3),
        "b": (9.003e-4, 1.540e-3, 1.521e-3, 7.169e-5, 1.255e-2, 8.134e-5, 1.515e-2),
        "c": (3.684e-3, 5.256e-3, 5.520e-3, 2.107e-4, 8.715e-2, 4.828e-4, 1.288e-1),
    }
    moves = {name: dict(zip(weights, own, strict=True)) for name, own in found.items()}

    assert not any(PLAIN.unlike(name, moves) for name in moves)
    assert PLAIN.unlike("c", {**moves, "c": times_as_far(moves["c"], 2.0)})
    for name in "ab":
        assert PLAIN.unlike(name, {**moves, name: times_as_far(moves[name], 1000.0)})


def test_friends_do_not_widen_the_bound() -> None:
    """Two of six that go as far together are both left out, and no other one is."""
    honest = moved(0, 6, 35, 0.2)
    moves = {**honest, **{n: times_as_far(honest[n], 30.0) for n in ("d1", "d4")}}

    assert [name for name in moves if PLAIN.unlike(name, moves)] == ["d1", "d4"]


def test_no_number_is_too_large_to_be_compared() -> None:
    """A distance that only float64 holds is a reason like any other, whoever else has moved."""
    moves = {"a": {"w": 1e-30}, "b": {"w": 1e-29}, "c": {"w": 1e-28}, "d": {"w": 1e80}}

    assert "times as far" in PLAIN.unlike("d", moves)
    assert not PLAIN.unlike("b", moves)
    assert not PLAIN.unlike("a", {**moves, "b": {"w": 1e300}, "c": {"w": 0.0}})


def test_a_factor_of_0_compares_nothing() -> None:
    """Then the optimizer's reach is the only bound."""
    held = screening()
    held = Screening(held.training, STEPS, TOTAL, "float32", LORA.scale, factor=0.0)

    assert not screen(held, {"a": 1e-4, "b": 1e-4, "c": 0.03}).devices


def test_a_head_is_bounded_as_factors_are() -> None:
    """A trained head that has moved too far, or whose size cannot be, is seen."""
    held = screening()
    one = brought(held, 0.001)
    head = {"score": np.zeros((3, 4), np.float32)}

    def with_head(number: float, known: Mapping[str, np.ndarray]) -> Brought:
        report = Report(2, 8, one.report.pairs, {"score": np.full((3, 4), number, np.float32)})
        return held.brought(report, ROUND, one.before, known)

    assert not held.screen({"a": with_head(0.01, head)}, is_retry=False).devices
    far = {"a": with_head(1.0, head), "b": with_head(0.01, head)}
    assert list(held.screen(far, is_retry=False).proven) == ["a"]
    unknown = {"a": with_head(1e5, {}), "b": with_head(0.01, {}), "c": with_head(0.01, {})}
    assert list(held.screen(unknown, is_retry=False).unlike) == ["a"]
