"""What the coordinator remembers is the dense sum of what everybody learned, whoever was there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.ledger import Ledger, Report, RoundResult
from coordinator.aggregation.rules import RULES, SERVER
from edge_sdk.errors import ConfigError, NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape
from edge_sdk.model.layout import Layout
from edge_sdk.runtime.training_state import merge_change

BLOCKS = 5
LORA = LoraConfig(r=4, lora_alpha=8.0)
SPLITS = {"one": 1, "two": 2, "four": 4}
SAMPLES = {"one": 8, "two": 4, "four": 20}
RANKS = {"one": 2, "two": 4, "four": 3, SERVER: 5}
SHAPES = {"attn": Shape(12, 7), "mlp": Shape(6, 9)}


def make_facts() -> ModelFacts:
    """Two weights in each of five blocks."""
    layout = Layout("h", BLOCKS, ("front",), tuple(() for _ in range(BLOCKS)), (), False, False)
    targets = {f"h.{i}.{n}": shape for i in range(BLOCKS) for n, shape in SHAPES.items()}
    return ModelFacts(layout, targets)


class Holder:
    """A participant as `merge_change` sees it: own factors and residual, but no model."""

    def __init__(self, pairs: Mapping[str, Pair], residual: Mapping[str, Factors]) -> None:
        self.pairs = dict(pairs)
        self.residual = dict(residual)
        self.before = self.products()

    def products(self) -> dict[str, Factors]:
        """What the own adapters add, scale inside."""
        return {
            n: Factors(p.b_OR * LORA.scale(n, p.a_RI.shape[0]), p.a_RI)
            for n, p in self.pairs.items()
        }

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace residuals."""
        self.residual.update(residual)

    def train(self, generator: np.random.Generator) -> None:
        """Move every factor somewhere else."""
        self.pairs = {
            n: Pair(_moved(p.a_RI, generator), _moved(p.b_OR, generator))
            for n, p in self.pairs.items()
        }

    def step(self, weight: str, rate: float) -> np.ndarray:
        """What its adapter of a weight has changed, had both factors gone *rate* of their way."""
        before, after = self.before[weight], self.products()[weight]
        ends = zip(before, after, strict=True)
        there = Factors(*(old + np.float64(rate) * (new - old) for old, new in ends))
        return _dense(there) - _dense(before)

    def take(self, result: RoundResult, name: str, weights: list[str]) -> None:
        """Go into the next round as somebody who was in the last one."""
        changes = {n: c for n, c in result.changes_for(name).items() if n in weights}
        self.pairs |= result.replaced.get(name, {})
        merge_change(self, changes, self.before)  # type: ignore[arg-type]
        self.before = self.products()

    def dense(self, weight: str) -> np.ndarray:
        """What is added to a weight, own adapter and residual together."""
        terms = [t[weight] for t in (self.residual, self.products()) if weight in t]
        return sum((_dense(t) for t in terms), np.zeros(make_facts().targets[weight]))


def _moved(values: np.ndarray, generator: np.random.Generator) -> Any:
    return values + 0.1 * generator.normal(size=values.shape).astype(np.float32)


def _dense(term: Factors) -> np.ndarray:
    product: np.ndarray = term.b_OR.astype(np.float64) @ term.a_RI.astype(np.float64)
    return product


class Simulation:
    """A coordinator's ledger, its own adapters, and devices that come and go."""

    def __init__(
        self,
        rule: str = "exact",
        ranks: Mapping[str, int] = RANKS,
        max_rank: int | None = None,
        rate: float = 1.0,
    ) -> None:
        self.facts, self.rate = make_facts(), rate
        slowed = replace(RULES[rule], server_learning_rate=rate)
        self.ledger = Ledger(self.facts, LORA, slowed, max_rank, seed=0)
        self.ranks = ranks
        self.generator = np.random.default_rng(0)
        self.server = Holder(self.ledger.enrol(SERVER, self.wanted(SERVER)), {})
        self.holders: dict[str, Holder] = {}
        self.current: set[str] = set()
        self.expected = {n: np.zeros(s) for n, s in self.facts.targets.items()}

    def weights(self, name: str) -> list[str]:
        """Weights that a participant trains."""
        if name == SERVER:
            return self.facts.weights(min(SPLITS.values()), BLOCKS)
        return self.facts.weights(0, SPLITS[name])

    def wanted(self, name: str) -> dict[str, int]:
        """Its ranks."""
        return dict.fromkeys(self.weights(name), self.ranks[name])

    def begin(self, members: set[str]) -> None:
        """Hand out what each member is to hold, as `round_start.py` does."""
        for name in sorted(members):
            own = self.ledger.enrol(name, self.wanted(name))
            if name not in self.current:
                residuals = self.ledger.residuals(name, self.weights(name))
                self.holders[name] = Holder(own, residuals)

    def round(self, members: set[str], heads: Mapping[str, Any] | None = None) -> RoundResult:
        """One round of *members*; the dense reference is kept beside it."""
        self.begin(members)
        heads = heads or {}
        total = sum(SAMPLES[name] for name in members)
        taking_part = {SERVER: self.server, **{n: self.holders[n] for n in members}}
        for holder in taking_part.values():
            holder.train(self.generator)
        for weight in self.facts.targets:
            block = self.facts.block_of(weight)
            left = sum(SAMPLES[n] for n in members if SPLITS[n] <= block)
            samples = {n: SAMPLES.get(n, left) for n, h in taking_part.items() if weight in h.pairs}
            training = [name for name, count in samples.items() if count]
            rate = self.rate if len(training) > 1 else 1.0
            for name in training:
                step = taking_part[name].step(weight, rate)
                self.expected[weight] += samples[name] / total * step
        reports = {
            n: Report(SPLITS.get(n, 0), SAMPLES.get(n, 0), dict(h.pairs), heads.get(n, {}))
            for n, h in taking_part.items()
        }
        result = self.ledger.aggregate(reports)
        for name, holder in taking_part.items():
            holder.take(result, name, self.weights(name))
        self.current = set(members)
        return result

    def check(self, name: str, holder: Holder) -> None:
        """Own adapter and residual together are dW."""
        for weight in self.weights(name):
            expected = self.expected[weight]
            error = np.linalg.norm(holder.dense(weight) - expected)
            assert error <= 3e-6 * np.linalg.norm(expected), (name, weight)


def test_each_sample_counts_once_in_every_block() -> None:
    """Cut at 1, 2 and 4 of 5 blocks with unequal samples, dW is the dense sum over all samples."""
    simulation = Simulation()

    result = simulation.round(set(SPLITS))

    assert result.changes.keys() == simulation.facts.targets.keys()
    assert result.cut_error == 0.0
    for weight, total in simulation.ledger.global_factors().items():
        expected = simulation.expected[weight]
        assert np.linalg.norm(_dense(total) - expected) <= 1e-6 * np.linalg.norm(expected)


MEMBERS = st.lists(st.sets(st.sampled_from(sorted(SPLITS)), min_size=1), min_size=1, max_size=6)


ALL_RANKS = 9
"""As many as a weight of `SHAPES` can have, and more."""
KEEPING_ALL = pytest.mark.parametrize(("rule", "most"), [("exact", None), ("fedex", ALL_RANKS)])


@KEEPING_ALL
@pytest.mark.parametrize("rate", [1.0, 0.75])
@given(MEMBERS)
@settings(deadline=None, max_examples=25)
def test_everybody_always_holds_dw(
    rule: str, most: int | None, rate: float, attendance: list[set[str]]
) -> None:
    """After every round residual and own adapter make dW, whoever missed which, at any rate."""
    simulation = Simulation(rule, max_rank=most, rate=rate)

    for members in attendance:
        simulation.round(members)

        simulation.check(SERVER, simulation.server)
        for name in members:
            simulation.check(name, simulation.holders[name])
    simulation.begin(set(SPLITS))
    for name, holder in simulation.holders.items():
        simulation.check(name, holder)


@pytest.mark.parametrize("rule", ["exact", "fedex"])
def test_a_restored_ledger_goes_on_with_the_same_bits(rule: str) -> None:
    """state() and load_state() make a ledger that is the same, and stays it."""
    one, two = Simulation(rule), Simulation(rule)
    for simulation in (one, two):
        simulation.round({"one", "two"}, {"one": {"score.weight": np.ones(3, np.float32)}})
    restored = Ledger(two.facts, LORA, rule, None, seed=0)
    restored.load_state(two.ledger.state())
    two.ledger = restored

    for simulation in (one, two):
        simulation.round({"one", "four"})

    first, second = one.ledger.state(), two.ledger.state()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert "head:score.weight" in first


@pytest.mark.parametrize("rule", ["fedex", "stack", "svd"])
def test_what_all_share_is_saved_once(rule: str) -> None:
    """However many devices there are, a checkpoint has no factors of each of them."""
    simulation = Simulation(rule)
    simulation.round(set(SPLITS))

    state = simulation.ledger.state()

    assert not [key for key in state if key.startswith("pair:")]
    restored = Ledger(simulation.facts, LORA, rule, None, seed=0)
    restored.load_state(state)
    for name, pairs in simulation.ledger.pairs.items():
        for weight, pair in pairs.items():
            assert all(map(np.array_equal, pair, restored.pairs[name][weight]))


def test_the_order_of_reports_changes_no_bit() -> None:
    """Whoever uploads first, the ledger holds the same."""
    states = []
    for order in ([SERVER, "one", "two", "four"], ["four", "two", "one", SERVER]):
        simulation = Simulation()
        simulation.begin(set(SPLITS))
        taking_part = {SERVER: simulation.server, **simulation.holders}
        for name in sorted(taking_part):
            taking_part[name].train(simulation.generator)
        simulation.ledger.aggregate(
            {n: Report(SPLITS.get(n, 0), SAMPLES.get(n, 0), taking_part[n].pairs) for n in order}
        )
        states.append(simulation.ledger.state())

    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


EQUAL = dict.fromkeys(RANKS, 4)


@given(MEMBERS)
@settings(deadline=None, max_examples=25)
def test_fedavg_makes_everybody_equal(attendance: list[set[str]]) -> None:
    """Members of a round all begin it with the mean of the last one, late or absent before."""
    simulation = Simulation("fedavg", EQUAL)

    for members in attendance:
        simulation.begin(members)
        means: dict[str, Pair] = {}
        for name in members:
            for weight, pair in simulation.holders[name].pairs.items():
                mean = means.setdefault(weight, pair)
                assert all(map(np.array_equal, pair, mean))
                if (total := simulation.ledger.totals.get(weight)) is not None:
                    np.testing.assert_array_equal(pair.a_RI, total.a_RI)
        result = simulation.round(members)
        for name in members:
            assert not set(result.changes_for(name)) & set(simulation.wanted(name))
            assert not simulation.ledger.residuals(name, simulation.wanted(name))


@given(MEMBERS)
@settings(deadline=None, max_examples=25)
def test_fedex_lets_all_go_on_with_the_same(attendance: list[set[str]]) -> None:
    """Members of a round begin it with the first ranks of the same factors, late or absent before.

    The scale stands with the ranks of each: s B is the same.
    """
    simulation = Simulation("fedex", max_rank=ALL_RANKS)

    for members in attendance:
        simulation.begin(members)
        for weight in simulation.facts.targets:
            shared = simulation.ledger.shared.get(weight)
            for name in members:
                if shared is None or weight not in simulation.holders[name].pairs:
                    continue
                pair = simulation.holders[name].pairs[weight]
                rank = min(simulation.ranks[name], shared.rank)
                scale = LORA.scale(weight, simulation.ranks[name])
                np.testing.assert_array_equal(pair.a_RI[:rank], shared.a_RI[:rank])
                np.testing.assert_allclose(
                    pair.b_OR[:, :rank] * scale, shared.b_OR[:, :rank], rtol=1e-6
                )
                assert not pair.b_OR[:, rank:].any()
        simulation.round(members)


def test_fedex_bounds_the_ranks_of_dw_and_says_what_that_costs() -> None:
    """Round for round dW has the ranks of that round's adapters at most, and is else the sum."""
    simulation = Simulation("fedex", {"one": 1, "two": 1, "four": 1, SERVER: 1})
    roomy = Simulation("fedex", {"one": 1, "two": 1, "four": 1, SERVER: 1}, max_rank=ALL_RANKS)

    simulation.round(set(SPLITS))
    for _ in range(3):
        before = {n: f.dense() for n, f in simulation.ledger.totals.items()}
        result = simulation.round(set(SPLITS))

        roomy.round(set(SPLITS))
        assert 0.0 < result.cut_error < 1.0
        for weight, total in simulation.ledger.totals.items():
            holders = sum(SPLITS[n] > simulation.facts.block_of(weight) for n in SPLITS)
            assert total.rank <= holders + 1
            change = total.dense() - before[weight]
            assert result.changes[weight].dense() == pytest.approx(change, abs=1e-5)
    for name, holder in simulation.holders.items():
        for weight in simulation.weights(name):
            total = _dense(simulation.ledger.totals[weight])
            error = np.linalg.norm(holder.dense(weight) - total)
            assert error <= 3e-6 * np.linalg.norm(total)
    assert max(total.rank for total in roomy.ledger.totals.values()) > 4


@pytest.mark.parametrize("rule", ["exact", "fedex", "stack"])
def test_a_changed_plan_changes_nothing_of_dw(rule: str) -> None:
    """Other ranks and other cuts in the middle of a run: everybody still holds dW, to 1e-6."""
    simulation = Simulation(rule)
    for _ in range(2):
        simulation.round(set(SPLITS))
    before = {n: _dense(f) for n, f in simulation.ledger.totals.items()}

    for name, weights, rank in (("one", 3, 3), ("two", 1, 2), ("four", 4, 1)):
        names = simulation.facts.weights(0, weights)
        own = simulation.ledger.enrol(name, dict.fromkeys(names, rank))
        holder = Holder(own, simulation.ledger.residuals(name, names))
        for weight in names:
            size = np.linalg.norm(before[weight])
            assert np.linalg.norm(holder.dense(weight) - before[weight]) <= 1e-6 * size


def test_stack_begins_every_round_afresh() -> None:
    """After each round B is 0 and A newly drawn, alike for everybody; dW holds all there was."""
    simulation = Simulation("stack")
    first = simulation.ledger.enrol("four", simulation.wanted("four"))["h.0.attn"]

    result = simulation.round(set(SPLITS))

    assert result.restarts
    second = simulation.holders["four"].pairs["h.0.attn"]
    assert not second.b_OR.any()
    assert not np.array_equal(first.a_RI, second.a_RI)
    assert np.array_equal(second.a_RI[:2], simulation.holders["one"].pairs["h.0.attn"].a_RI)
    simulation.check("four", simulation.holders["four"])
    simulation.check(SERVER, simulation.server)


def test_svd_gives_each_its_best_approximation() -> None:
    """With unequal ranks and cuts, a participant's adapter is the best of its rank of dW."""
    simulation = Simulation("svd")

    simulation.round(set(SPLITS))

    for name, holder in {**simulation.holders, SERVER: simulation.server}.items():
        for weight, pair in holder.pairs.items():
            total = _dense(simulation.ledger.totals[weight])
            sigma = np.linalg.svd(total)[1]
            own = _dense(simulation.ledger._product(weight, pair))
            rest = np.sqrt(np.sum(sigma[simulation.ranks[name] :] ** 2))
            assert np.linalg.norm(total - own) <= rest + 3e-6 * np.linalg.norm(total)
            expected = simulation.expected[weight]
            assert np.linalg.norm(total - expected) <= 3e-6 * np.linalg.norm(expected)


def test_fedavg_is_the_mean_over_all_samples() -> None:
    """Each factor is the mean over the samples of all devices, the coordinator's included."""
    simulation = Simulation("fedavg", EQUAL)
    simulation.begin(set(SPLITS))
    taking_part = {SERVER: simulation.server, **simulation.holders}
    for holder in taking_part.values():
        holder.train(simulation.generator)
    reports = {
        n: Report(SPLITS.get(n, 0), SAMPLES.get(n, 0), h.pairs) for n, h in taking_part.items()
    }

    simulation.ledger.aggregate(reports)

    weight = "h.2.attn"  # "four" trains it; the samples of "one" and "two" are the coordinator's
    mean = (20 * reports["four"].pairs[weight].a_RI + 12 * reports[SERVER].pairs[weight].a_RI) / 32
    np.testing.assert_allclose(simulation.ledger.totals[weight].a_RI, mean, rtol=1e-5, atol=1e-7)
    scale = LORA.scale("w", 4)
    for name, total in simulation.ledger.global_factors().items():
        held = simulation.ledger.pairs[SERVER if name.startswith("h.4") else "four"][name]
        np.testing.assert_allclose(
            total.dense(), scale * held.b_OR @ held.a_RI, rtol=1e-4, atol=1e-6
        )


def test_fedavg_refuses_unequal_ranks() -> None:
    """Unequal ranks are refused when they are reported, too."""
    with pytest.raises(ConfigError, match="equal ranks"):
        Simulation("fedavg").round(set(SPLITS))


@pytest.mark.parametrize("server_has_it", [True, False])
def test_a_head_is_the_mean_over_samples(server_has_it: bool) -> None:
    """A trained head is averaged over the samples of those who hold it."""
    heads = {"four": {"score": np.full(2, 4.0, np.float32)}}
    if server_has_it:
        heads[SERVER] = {"score": np.full(2, 1.0, np.float32)}
    else:
        heads["one"] = {"score": np.full(2, 1.0, np.float32)}
        heads["two"] = {"score": np.full(2, 1.0, np.float32)}
    simulation = Simulation()

    result = simulation.round(set(SPLITS), heads)

    np.testing.assert_allclose(result.head["score"], (20 * 4.0 + 12 * 1.0) / 32, rtol=1e-6)
    assert simulation.ledger.head is result.head


def test_a_head_of_the_coordinator_without_samples_counts_nothing() -> None:
    """Where every device holds the head, the coordinator's is not in the mean."""
    heads = {SERVER: {"score": np.full(2, 9.0, np.float32)}}
    heads["one"] = {"score": np.full(2, 1.0, np.float32)}

    result = Simulation().round({"one"}, heads)

    assert result.head["score"].tolist() == [1.0, 1.0]


def test_a_cap_is_reported() -> None:
    """A rank cap tells how much of a round it has cut, and the ledger follows what it kept."""
    simulation = Simulation(max_rank=1)

    result = simulation.round(set(SPLITS))

    assert 0.0 < result.cut_error < 1.0
    assert {change.rank for change in result.changes.values()} == {1}
    for weight, total in simulation.ledger.totals.items():
        np.testing.assert_allclose(total.dense(), result.changes[weight].dense(), atol=1e-6)


def test_alone_nobody_needs_a_residual() -> None:
    """When one participant alone trains a weight its residual stays zero, without ranks."""
    simulation = Simulation()

    for _ in range(20):
        simulation.round({"four"})

    kept = simulation.holders["four"].residual.values()
    assert {factors.rank for factors in kept} == {0}
    simulation.current = set()  # it comes back and is told everything anew
    simulation.begin({"four"})
    assert {factors.rank for factors in simulation.holders["four"].residual.values()} == {0}


def test_enrolling_again_gives_the_same_factors() -> None:
    """A known participant keeps its factors; another rank or a deeper cut makes new ones."""
    ledger = Simulation().ledger
    first = ledger.enrol("one", {"h.0.attn": 2, "h.0.mlp": 0})

    again = ledger.enrol("one", {"h.0.attn": 2})
    other = ledger.enrol("one", {"h.0.attn": 3, "h.1.attn": 2})

    assert first.keys() == {"h.0.attn"}
    assert again["h.0.attn"] is first["h.0.attn"]
    assert {n: p.a_RI.shape[0] for n, p in other.items()} == {"h.0.attn": 3, "h.1.attn": 2}
    assert np.array_equal(other["h.0.attn"].a_RI[:2], first["h.0.attn"].a_RI)
    assert not other["h.0.attn"].b_OR.any()


@pytest.mark.parametrize("rule", ["exact", "fedex", "svd", "stack", "zeropad"])
@pytest.mark.parametrize("number", [float("nan"), 3.3e38])
def test_an_aggregation_that_fails_changes_nothing(rule: str, number: float) -> None:
    """Whatever is raised, the ledger goes on as if the round had not been joined."""
    spoilt, unharmed = (Simulation(rule, dict.fromkeys(RANKS, 3)) for _ in range(2))
    for simulation in (spoilt, unharmed):
        simulation.round({"one", "two"})
    before = spoilt.ledger.state()
    own = spoilt.ledger.pairs["one"].items()
    pairs = {name: Pair(*(np.full_like(factor, number) for factor in pair)) for name, pair in own}

    with np.errstate(all="ignore"), pytest.raises((NumericError, np.linalg.LinAlgError)):
        spoilt.ledger.aggregate({"one": Report(1, 8, pairs)})

    after = spoilt.ledger.state()
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
