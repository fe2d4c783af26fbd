"""Whose uploads are left out: whoever has brought what cannot be, or what nobody else is like."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.screening import Brought, Diverged, Screening
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
