"""Updates merged when they come add up to what everybody learned, however old they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from coordinator.aggregation.buffer import (
    BufferedUpdate,
    Merging,
    UpdateBuffer,
    expected_staleness,
    freshness,
)
from coordinator.aggregation.ledger import Ledger, Report
from coordinator.aggregation.rules import SERVER
from coordinator.aggregation.versions import VersionedStart
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.protocol.messages import RoundStart, Stamp
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training_state import merge_change
from tests.coordinator.aggregation.test_ledger import (
    LORA,
    RANKS,
    SAMPLES,
    SPLITS,
    Holder,
    make_facts,
)

POWER = 0.5
FACTS = make_facts()
MERGING = Merging(FACTS, LORA, POWER)


def own_ranks(name: str) -> dict[str, int]:
    """The weights that a participant holds, with its rank."""
    first, stop = (1, 5) if name == SERVER else (0, SPLITS[name])
    return dict.fromkeys(FACTS.weights(first, stop), RANKS[name])


def make_ledger() -> Ledger:
    """A ledger of the coordinator and three devices."""
    ledger = Ledger(FACTS, LORA, "exact", None, 0)
    for name in RANKS:
        ledger.enrol(name, own_ranks(name))
    return ledger


def moved(pairs: Mapping[str, Pair], seed: int) -> dict[str, Pair]:
    """Factors some training away from *pairs*."""
    draw = np.random.default_rng(seed)

    def step(values: np.ndarray) -> np.ndarray:
        return (values + 0.1 * draw.normal(size=values.shape)).astype(np.float32)

    return {n: Pair(step(p.a_RI), step(p.b_OR)) for n, p in pairs.items()}


def dense(weight: str, pair: Pair) -> np.ndarray:
    """What a pair adds to its weight."""
    a_RI, b_OR = (factor.astype(np.float64) for factor in pair)
    added: np.ndarray = LORA.scale(weight, len(a_RI)) * b_OR @ a_RI
    return added


def total(ledger: Ledger, weight: str) -> np.ndarray:
    """What the ledger has of a weight."""
    held = ledger.totals.get(weight)
    return np.zeros(FACTS.targets[weight]) if held is None else held.dense().astype(np.float64)


def upload(ledger: Ledger, buffer: UpdateBuffer, name: str, version: int, seed: int) -> None:
    """Let a device end a tour that it began at *version*."""
    before = ledger.pairs[name]
    report = Report(SPLITS[name], SAMPLES[name], moved(before, seed))
    buffer.updates.append(BufferedUpdate(name, version, before, report))
    ledger.pairs[name] = dict(report.pairs)


def plan(name: str) -> Plan:
    """What a device runs."""
    alphas = dict.fromkeys(own_ranks(name), LORA.lora_alpha)
    ranks = own_ranks(name)
    return Plan(split=SPLITS[name], ranks=ranks, alphas=alphas, batch_size=4, micro_batch=4)


def test_a_buffer_of_everybody_is_a_round() -> None:
    """One fresh update of each device, and what it left to the coordinator, merge as a round."""
    rounds, buffered, buffer = make_ledger(), make_ledger(), UpdateBuffer()
    server = Report(0, 0, moved(rounds.pairs[SERVER], 9))
    reports = {SERVER: server}
    for number, name in enumerate(sorted(SPLITS)):
        reports[name] = Report(SPLITS[name], SAMPLES[name], moved(rounds.pairs[name], number))
        upload(buffered, buffer, name, 0, number)
        buffer.serve(SPLITS[name], SAMPLES[name])

    rounds.aggregate(reports)
    MERGING.merge(buffer, buffered, server, 0)

    for weight in FACTS.targets:
        np.testing.assert_allclose(total(buffered, weight), total(rounds, weight), atol=1e-6)
    assert {n: set(p) for n, p in buffered.pairs.items()} == {
        n: set(p) for n, p in rounds.pairs.items()
    }


def test_an_old_update_counts_by_its_age() -> None:
    """A merge adds sum_i p_i s(t_i) (s B' A' - s B A), p_i of all samples of the block."""
    ledger, buffer = make_ledger(), UpdateBuffer()
    upload(ledger, buffer, "four", 0, 1)
    upload(ledger, buffer, "two", 3, 2)
    buffer.serve(2, 6.0)
    server = Report(0, 0, moved(ledger.pairs[SERVER], 3))
    own = dict(ledger.pairs[SERVER])

    MERGING.merge(buffer, ledger, server, 3)

    for block, samples in ((0, 24.0), (3, 26.0)):  # block 3: of "four", and what "two" left
        weight = f"h.{block}.attn"
        expected = np.zeros(FACTS.targets[weight])
        for update, s in zip(buffer.updates, (4.0**-POWER, 1.0), strict=True):
            if weight in update.report.pairs:
                step = dense(weight, update.report.pairs[weight])
                step -= dense(weight, update.before[weight])
                expected += update.report.num_samples / samples * s * step
        if block == 3:
            step = dense(weight, server.pairs[weight]) - dense(weight, own[weight])
            expected += 6.0 / samples * step
        np.testing.assert_allclose(total(ledger, weight), expected, atol=1e-5)


@pytest.mark.parametrize(("staleness", "counts"), [(0, 1.0), (3, 0.5), (8, 1.0 / 3.0)])
def test_freshness_is_fedbuffs(staleness: int, counts: float) -> None:
    """An update that t merges have overtaken counts 1 / sqrt(1 + t)."""
    assert freshness(staleness, 0.5) == pytest.approx(counts)


def test_a_slow_device_is_behind_by_what_others_merge_meanwhile() -> None:
    """Of five devices one that is ten times as slow misses the merges of ten fast tours."""
    ages = expected_staleness({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "slow": 10.0}, 5)

    assert ages["slow"] == pytest.approx(8.2)
    assert ages["a"] == pytest.approx(0.82)


def apply(holder: Holder, start: RoundStart, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Take over what a RoundStart brings, as a device does."""
    names = {name[:-2] for name in tensors if name.endswith(".V")}
    residual = {n: Factors(tensors[f"{n}.U"][0], tensors[f"{n}.V"][0]) for n in names}
    own = {name[:-2] for name in tensors if name.endswith(".A")}
    holder.pairs |= {n: Pair(tensors[f"{n}.A"][0], tensors[f"{n}.B"][0]) for n in own}
    if start.is_full:
        holder.residual = residual
    else:
        merge_change(holder, residual, holder.before)  # type: ignore[arg-type]
    holder.before = holder.products()


@pytest.mark.parametrize("most", [1, 20])
def test_a_tour_begins_with_the_newest_dw(most: int) -> None:
    """Whatever a device holds and has missed, it computes with dW at the start of its tour."""
    ledger, version = make_ledger(), 0
    starts = VersionedStart(ledger, FACTS, most)
    holders = {name: Holder(ledger.pairs[name], {}) for name in SPLITS}
    fulls = 0
    buffer = UpdateBuffer()
    for tour, name in enumerate(["one", "two", "one", "one", "four", "one", "two", "four", "two"]):
        holder, stamp = holders[name], Stamp(device=name, round=version)
        start, tensors = starts.begin(stamp, 1, plan(name), 0, evaluate=False)
        apply(holder, start, tensors)
        fulls += start.is_full
        for weight in own_ranks(name):
            np.testing.assert_allclose(holder.dense(weight), total(ledger, weight), atol=1e-5)
        upload(ledger, buffer, name, version, tour)
        holder.pairs = dict(ledger.pairs[name])
        buffer.serve(SPLITS[name], SAMPLES[name])
        if tour % 3 != 1:  # the next one begins before its own last tour is merged
            server = Report(0, 0, moved(ledger.pairs[SERVER], tour))
            result = MERGING.merge(buffer, ledger, server, version)
            version, buffer = version + 1, UpdateBuffer()
            starts.merged(result, version)

    assert fulls == {1: 5, 20: 3}[most]


def test_a_buffer_survives_a_restart() -> None:
    """What a checkpoint holds of a buffer merges as the buffer itself would have."""
    merged = []
    for is_restored in (False, True):
        ledger, buffer = make_ledger(), UpdateBuffer()
        for seed, name in enumerate(["two", "one", "two"]):
            upload(ledger, buffer, name, seed, seed)
            buffer.serve(SPLITS[name], SAMPLES[name])
        server = Report(0, 0, moved(ledger.pairs[SERVER], 3))
        kept = UpdateBuffer.of_state(buffer.state()) if is_restored else buffer

        MERGING.merge(kept, ledger, server, 3)

        merged.append({weight: total(ledger, weight) for weight in FACTS.targets})
    for weight in FACTS.targets:
        assert (merged[0][weight] == merged[1][weight]).all()


def test_heads_move_by_what_counts() -> None:
    """A head moves towards each holder's by its share and its freshness; the rest stays."""
    ledger, buffer = make_ledger(), UpdateBuffer()
    ledger.head = {"score.weight": np.full(3, 8.0, np.float32)}
    new = {"score.weight": np.full(3, 4.0, np.float32)}
    buffer.updates.append(BufferedUpdate("one", 0, {}, Report(1, 6, {}, new)))
    buffer.updates.append(BufferedUpdate("two", 3, {}, Report(2, 2, {}, new)))

    MERGING.merge(buffer, ledger, Report(0, 0, dict(ledger.pairs[SERVER])), 3)

    moved_by = 0.75 * freshness(3, POWER) + 0.25
    np.testing.assert_allclose(ledger.head["score.weight"], 8.0 - 4.0 * moved_by)


def test_what_is_not_finite_changes_nothing() -> None:
    """A merge that would spoil dW leaves the ledger as it was."""
    ledger, buffer = make_ledger(), UpdateBuffer()
    upload(ledger, buffer, "one", 0, 1)
    spoilt = {n: Pair(p.a_RI * np.float32(np.inf), p.b_OR) for n, p in ledger.pairs["one"].items()}
    bad = BufferedUpdate("one", 0, buffer.updates[0].before, Report(1, 8, spoilt))
    rounds = ledger.rounds

    with pytest.raises((NumericError, np.linalg.LinAlgError)), np.errstate(all="ignore"):
        MERGING.merge(UpdateBuffer([bad]), ledger, Report(0, 0, ledger.pairs[SERVER]), 0)

    assert (ledger.totals, ledger.rounds) == ({}, rounds)
