"""A colluding minority decides nothing, where the run asks for that; honest devices lose little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.buffer import BufferedUpdate, Merging, UpdateBuffer
from coordinator.aggregation.ledger import Ledger, Report
from coordinator.aggregation.robust import (
    TRUSTING,
    Robust,
    change,
    clipped_to,
    distances,
    inner,
    outvoted,
    trimmed,
)
from coordinator.aggregation.rules import RULES, SERVER, Contribution
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.factors import Factors, norm
from edge_sdk.lora.targets import LoraConfig, Shape
from tests.coordinator.aggregation.test_buffer import FACTS
from tests.coordinator.aggregation.test_buffer import LORA as BUFFER_LORA

SHAPE = Shape(40, 30)
LORA = LoraConfig(r=4, lora_alpha=8)
RANKS = {"a": 4, "b": 2, "c": 8, "d": 4, "e": 4, "x": 4, "y": 2}
COLLUDING = ("x", "y")
WAY = np.random.default_rng(7).normal(size=SHAPE)
"""The way that the gradient points for everybody who is honest."""


def trained(device: str, rank: int, *, size: float) -> Contribution:
    """What a device learns that goes *size* far along the way, with noise of its own."""
    before = initial_pair("w", rank, SHAPE, seed=0)
    noise = np.random.default_rng(sum(map(ord, device))).normal(size=SHAPE)
    moved = WAY + 0.3 * noise if size > 0 else WAY
    b_OR = size * 0.01 * moved @ np.linalg.pinv(before.a_RI.astype(np.float64))
    after = Pair(before.a_RI, (b_OR / LORA.scale("w", rank)).astype(np.float32))
    return Contribution(1.0 / len(RANKS), LORA.scale("w", rank), before, after, device=device)


def contributions(size: float, ranks: Mapping[str, int] = RANKS) -> dict[str, Contribution]:
    """Seven devices, two of which go together *size* times as far, the other way."""
    return {
        name: trained(name, rank, size=-size if name in COLLUDING else 1.0)
        for name, rank in ranks.items()
    }


def learned(rule: str, robust: Robust, own: Mapping[str, Contribution]) -> np.ndarray:
    """What all of that makes of the weight, as a dense matrix."""
    kept = robust({"w": own}).contributions["w"]
    update = RULES[rule].join(kept, SHAPE, None)
    found = update.total or update.change
    assert found is not None
    return found.dense().astype(np.float64)


def along(matrix: np.ndarray) -> float:
    """How far a matrix goes along the honest way, in that of honest devices alone."""
    honest = {n: c for n, c in contributions(1.0).items() if n not in COLLUDING}
    best = learned("exact", TRUSTING, honest)
    return float((matrix * best).sum() / (best * best).sum())


DEFENCES = {
    "krum": ("exact", Robust("krum", 2), RANKS),
    "clip": ("exact", Robust(clip=1.0), RANKS),
    "krum and clip": ("svd", Robust("krum", 2, clip=2.0), RANKS),
    "trimmed": ("svd", Robust("trimmed-mean", 2), RANKS),
    "trimmed, equal ranks": ("fedavg", Robust("trimmed-mean", 2), dict.fromkeys(RANKS, 4)),
    "trimmed, padded": ("zeropad", Robust("trimmed-mean", 2), RANKS),
    "trimmed, stacked": ("stack", Robust("trimmed-mean", 2), RANKS),
}


@pytest.mark.parametrize("size", [3.0, 10.0, 1e3])
@pytest.mark.parametrize("name", DEFENCES)
def test_two_of_seven_decide_nothing(name: str, size: float) -> None:
    """Two that work together turn the update around; with any defence it keeps the honest way."""
    rule, robust, ranks = DEFENCES[name]
    own = contributions(size, ranks)

    assert along(learned(rule, TRUSTING, own)) < 0.0 or size == 3.0 or rule == "zeropad"
    assert 0.25 < along(learned(rule, robust, own)) < 1.5


@pytest.mark.parametrize("name", DEFENCES)
def test_honest_devices_lose_little(name: str) -> None:
    """Where all go the same way, a defence goes that way, too."""
    rule, robust, ranks = DEFENCES[name]
    own = {n: trained(n, rank, size=1.0) for n, rank in ranks.items()}

    with_it, without_it = learned(rule, robust, own), learned(rule, TRUSTING, own)

    assert 0.6 < along(with_it) < 1.4
    assert np.linalg.norm(with_it - without_it) < 0.8 * np.linalg.norm(without_it)


def random_contribution(device: str, seed: int, rank: int = 4) -> Contribution:
    """Factors before and after a round, of any numbers."""
    draw = np.random.default_rng(seed)

    def pair() -> Pair:
        return Pair(
            draw.normal(size=(rank, SHAPE[1])).astype(np.float32),
            draw.normal(size=(SHAPE[0], rank)).astype(np.float32),
        )

    return Contribution(0.2, 0.5, pair(), pair(), device=device)


def test_clipping_keeps_its_bound() -> None:
    """No device moves a weight further than the bound, those within it are left as they are."""
    own = {name: random_contribution(name, seed) for seed, name in enumerate("abcde")}
    far = own["e"]
    own["e"] = Contribution(0.2, 50.0, far.before, far.after, device="e")
    usual = float(np.median([norm(change(c)) for c in own.values()]))

    found, names = clipped_to(own, 1.05)

    assert "e" in names
    for name, contribution in found.items():
        dense = change(contribution).dense().astype(np.float64)
        assert np.linalg.norm(dense) <= 1.05 * usual * (1 + 1e-5)
        assert (contribution is own[name]) == (name not in names)


def test_distances_are_those_of_the_matrices() -> None:
    """Products of factors give what dense matrices give; so for stacks of experts."""
    draw = np.random.default_rng(0)
    for sizes in ((), (3,)):
        terms = [
            Factors(draw.normal(size=(*sizes, 9, rank)), draw.normal(size=(*sizes, rank, 7)))
            for rank in (2, 3, 4)
        ]
        dense = [term.dense() for term in terms]
        squares = [float((matrix**2).sum()) for matrix in dense]

        assert inner(terms[0], terms[1]) == pytest.approx(float((dense[0] * dense[1]).sum()))
        expected = [[float(((m - n) ** 2).sum()) for n in dense] for m in dense]
        found = distances(terms) * np.median(squares)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_krum_knows_devices_of_other_splits() -> None:
    """Devices that share one weight of two are compared by it; fewer than five leave nobody out."""
    first, second = contributions(5.0), contributions(5.0)
    by_weight = {"w": first, "v": {n: c for n, c in second.items() if n in "abxy"}}

    assert outvoted(by_weight, 2) == ["x", "y"]
    assert outvoted({"w": {n: first[n] for n in "abcx"}}, 2) == []
    assert outvoted({"w": {n: first[n] for n in "abcdx"}}, 2) == ["x"]


def test_the_trimmed_mean_is_that_of_each_number() -> None:
    """Of equal ranks: numpy's sort and mean, in float64; the coordinator's own is not touched."""
    own = {name: random_contribution(name, seed) for seed, name in enumerate("abcde")}
    own[SERVER] = random_contribution("", 9)

    found = trimmed(own, 1)

    assert found[SERVER] is own[SERVER]
    for factor in ("a_RI", "b_OR"):
        arrays = [getattr(own[name].after, factor).astype(np.float64) for name in "abcde"]
        expected = np.sort(np.stack(arrays), axis=0)[1:4].mean(axis=0)
        for name in "abcde":
            np.testing.assert_allclose(getattr(found[name].after, factor), expected, rtol=1e-5)


def test_few_devices_are_left_as_they_are() -> None:
    """Of two nobody can tell which one is wrong."""
    own = {name: random_contribution(name, seed) for seed, name in enumerate("ab")}
    for robust in (Robust("krum", 1), Robust("trimmed-mean", 1), Robust(clip=1.0)):
        screened = robust({"w": own})

        assert screened == ({"w": own}, [], [])


def test_a_trained_head_is_screened_alike() -> None:
    """One of five heads is far away: it counts no more than the others do."""
    old = {"score": np.zeros((2, 3), np.float32)}
    heads = {
        n: {"score": np.full((2, 3), x, np.float32)}
        for n, x in zip("abcd", range(1, 5), strict=True)
    }
    heads["x"] = {"score": np.full((2, 3), 1e3, np.float32)}

    means = {
        name: float(np.mean([h["score"].mean() for h in robust.heads(heads, old).values()]))
        for name, robust in {
            "trimmed": Robust("trimmed-mean", 1),
            "clip": Robust(clip=1.0),
            "none": TRUSTING,
        }.items()
    }

    assert means["trimmed"] == pytest.approx(3.0)
    assert means["clip"] == pytest.approx((1 + 2 + 3 + 3 + 3) / 5)
    assert means["none"] > 200.0


@pytest.mark.parametrize("robust", [Robust("krum", 1), Robust(clip=1.0)])
def test_many_updates_of_one_device_are_one_vote(robust: Robust) -> None:
    """Without a barrier a hostile device that is fast does not outnumber the others."""
    ledger = Ledger(FACTS, BUFFER_LORA, "exact", None, 0, robust=robust)
    weight = next(iter(FACTS.targets))

    def update(device: str, number: float) -> BufferedUpdate:
        before = dict(ledger.enrol(device, {weight: 2}))
        b_OR = np.full_like(before[weight].b_OR, number)
        after = {weight: Pair(before[weight].a_RI, b_OR)}
        return BufferedUpdate(device, 0, before, Report(2, 4, after))

    ledger.enrol(SERVER, {})
    updates = [update(name, 0.01) for name in "abcd"] + [update("x", -1.0) for _ in range(9)]
    result = Merging(FACTS, BUFFER_LORA, 0.0).merge(
        UpdateBuffer(updates), ledger, Report(0, 0, {}), 0
    )

    assert result.left_out == (["x"] if robust.method == "krum" else [])
    assert result.clipped == ([] if robust.method == "krum" else ["x"])
    learned = result.changes[weight].dense()
    honest = updates[0].report.pairs[weight].b_OR @ updates[0].before[weight].a_RI
    assert float((learned * honest).sum()) > 0.0  # the way of the others


def test_left_out_is_no_part_of_the_round() -> None:
    """Ledger and result say so: dW is that of the others alone, and the device keeps its own."""
    ledger = Ledger(FACTS, BUFFER_LORA, "exact", None, 0, robust=Robust("krum", 1))
    weight = next(iter(FACTS.targets))
    reports: dict[str, Any] = {}
    for name in (*"abcd", "x"):
        pair = ledger.enrol(name, {weight: 2})[weight]
        number = -1.0 if name == "x" else 0.01
        reports[name] = Report(2, 4, {weight: Pair(pair.a_RI, np.full_like(pair.b_OR, number))})
    others = Ledger(FACTS, BUFFER_LORA, "exact", None, 0)
    for name in "abcd":
        others.enrol(name, {weight: 2})

    result = ledger.aggregate(reports)
    expected = others.aggregate({name: reports[name] for name in "abcd"})

    assert result.left_out == ["x"]
    np.testing.assert_array_equal(result.changes[weight].b_OR, expected.changes[weight].b_OR)
    assert ledger.pairs["x"][weight] is reports["x"].pairs[weight]
