"""A device has what its account says, to the bit, and what it lacks is stated and comes later."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from coordinator.aggregation.accounts import Accounts
from coordinator.aggregation.ledger import Ledger, Report, RoundResult
from coordinator.aggregation.rules import RULES, SERVER
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.exchange import Known, moved, read_pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape
from edge_sdk.model.layout import Layout
from edge_sdk.protocol.codecs import as_read

LORA = LoraConfig(r=4, lora_alpha=8.0)
RANKS = {"a": 1, "b": 3, "c": 5}
SAMPLES = {"a": 8, "b": 4, "c": 20}
SHAPES = {"linear": Shape(24, 17), "experts": Shape(3, 13, 16)}


def make_facts() -> ModelFacts:
    """A linear layer and a stack of experts in one block."""
    layout = Layout("h", 1, ("front",), ((),), (), False, False)
    return ModelFacts(layout, {f"h.0.{name}": shape for name, shape in SHAPES.items()})


def dense(term: Factors) -> np.ndarray:
    """The matrix."""
    found: np.ndarray = term.b_OR.astype(np.float64) @ term.a_RI.astype(np.float64)
    return found


class Run:
    """Devices that hold everything, and their coordinator."""

    def __init__(
        self,
        codec: str = "int8",
        rank: int | None = 2,
        ranks: Mapping[str, int] = RANKS,
        rule: str = "exact",
    ):
        self.facts, self.ranks = make_facts(), ranks
        keeps_all = RULES[rule].redistribute is not None
        self.accounts = Accounts(codec, lambda _: rank, LORA.scale, keeps_all=keeps_all)
        self.ledger = Ledger(self.facts, LORA, rule, None, 0, self.accounts)
        self.draw = np.random.default_rng(0)
        self.known = {name: Known(codec) for name in ranks}
        self.own: dict[str, dict[str, Pair]] = {}
        self.server = self.ledger.enrol(SERVER, dict.fromkeys(self.facts.targets, 2))
        for name in ranks:
            self.begin(name)

    def begin(self, name: str) -> None:
        """Let a device start with all that there is for it."""
        weights = list(self.facts.targets)
        self.own[name] = dict(self.ledger.enrol(name, dict.fromkeys(weights, self.ranks[name])))
        assert self.ledger.accounts is not None
        given = self.ledger.accounts.open(name, weights, self.ledger.totals, self.own[name])
        self.known[name].begin(self.own[name], given)
        self.known[name].kept = self.ledger.accounts.kept(name)

    def round(self, *members: str, step: float = 0.1) -> RoundResult:
        """Let *members* train, and give them something of what comes of it."""
        reports = {SERVER: Report(0, 0, self.server)}
        for name in members:
            own = {n: self._trained(pair, step) for n, pair in self.own[name].items()}
            self.own[name] = own
            changes = self.known[name].changes(own)
            self.known[name].told(changes)
            codec = self.known[name].codec
            read = {n: read_pair(change, codec) for n, change in changes.items()}
            pairs = {n: moved(self.ledger.pairs[name][n], change) for n, change in read.items()}
            reports[name] = Report(1, SAMPLES[name], pairs)
        result = self.ledger.aggregate(reports)
        assert (accounts := self.ledger.accounts) is not None
        self.server = self.ledger.pairs[SERVER]
        for name in members:
            pairs = self.ledger.pairs[name]
            most = accounts.most_rank(self.ledger.totals, self.facts.targets, pairs)
            moves = result.handouts[name].moves
            read = {n: read_pair(move, accounts.codec) for n, move in moves.items()}
            self.own[name] |= self.known[name].move(self.own[name], read)
            changes_read = {
                n: Factors(*(as_read(x, accounts.codec) for x in change))
                for n, change in result.handouts[name].changes.items()
            }
            self.known[name].add(changes_read, most)
            self.known[name].kept = accounts.kept(name)
        return result

    def _trained(self, pair: Pair, step: float) -> Pair:
        return Pair(*(x + step * self.draw.normal(size=x.shape).astype(np.float32) for x in pair))

    def lag(self, name: str) -> float:
        """What a device lacks of dW, from what it really computes with."""
        lacks = size = 0.0
        known = self.known[name]
        residual = known.residual(LORA.scale)
        for weight, total in self.ledger.totals.items():
            pair = known.pairs[weight]  # its own factors, but for what rounding kept from us
            scale = LORA.scale(weight, self.ranks[name])
            has = dense(residual[weight]) + scale * dense(Factors(pair.b_OR, pair.a_RI))
            lacks += float(np.sum((dense(total) - has) ** 2))
            size += float(np.sum(dense(total) ** 2))
        return float(np.sqrt(lacks / size))


BOTH = pytest.mark.parametrize("rule", ["exact", "fedex"])


@BOTH
@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
def test_a_device_has_what_its_account_says(codec: str, rule: str) -> None:
    """Round for round both sides hold the same bits, and the lag is what the result states."""
    run = Run(codec, rule=rule)

    for _ in range(5):
        result = run.round(*RANKS)

        for name, known in run.known.items():
            given = run.accounts.given[name]
            assert known.received.keys() == given.keys()
            for weight, factors in given.items():
                np.testing.assert_array_equal(known.received[weight].a_RI, factors.a_RI)
                np.testing.assert_array_equal(known.received[weight].b_OR, factors.b_OR)
                np.testing.assert_array_equal(
                    known.pairs[weight].b_OR, run.ledger.pairs[name][weight].b_OR
                )
            assert run.lag(name) == pytest.approx(result.handouts[name].lag, rel=1e-3)
            assert result.handouts[name].lag > 0.01


@BOTH
def test_nothing_is_lost(rule: str) -> None:
    """When nobody learns any more, what devices lack comes round by round, until they have all."""
    run = Run(rule=rule)
    run.round(*RANKS, step=0.5)
    run.round(*RANKS, step=0.5)
    first = run.lag("a")

    lags = [run.round(*RANKS, step=0.0).handouts["a"].lag for _ in range(16)]

    assert first > 0.1
    assert lags[-1] < 1e-3
    for name in RANKS:
        assert run.lag(name) < 1e-3
        for weight, pair in run.own[name].items():  # what rounding had kept back went up, too
            assert run.ledger.pairs[name][weight].b_OR == pytest.approx(pair.b_OR, abs=1e-5)


@BOTH
def test_room_for_all_lacks_nothing(rule: str) -> None:
    """In float32, without a budget, a device has dW itself."""
    run = Run("float32", None, rule=rule)

    for _ in range(4):
        run.round(*RANKS)

        assert all(run.lag(name) < 2e-6 for name in RANKS)


@BOTH
def test_what_was_given_has_as_many_ranks_as_dw(rule: str) -> None:
    """An account does not grow from round to round."""
    run = Run(rank=6, rule=rule)

    for _ in range(8):
        run.round(*RANKS)

    most = max(total.rank for total in run.ledger.totals.values())
    assert most <= min(sum(RANKS.values()) + 2, 17)
    for name, given in run.accounts.given.items():
        own = RANKS[name] if rule == "fedex" else 0
        assert all(factors.rank <= most + own for factors in given.values())


@BOTH
def test_who_missed_a_round_begins_with_everything(rule: str) -> None:
    """A device that comes back, or comes late, lacks nothing, and goes on as the others do."""
    run = Run(rule=rule)
    run.round("a", "b", step=0.5)
    run.round("a", step=0.5)
    assert "b" not in run.accounts.given

    for name in ("b", "c"):
        run.begin(name)

        assert run.lag(name) < 1e-5
    result = run.round(*RANKS)
    assert run.lag("b") == pytest.approx(result.handouts["b"].lag, rel=1e-3)


@BOTH
def test_another_plan_begins_with_everything(rule: str) -> None:
    """Where a smaller rank drops something of the own factors, it is given at once."""
    run = Run(rule=rule)
    run.round(*RANKS, step=0.5)

    run.ranks = {**RANKS, "c": 2}
    run.begin("c")

    assert run.lag("c") < 1e-5


@BOTH
def test_restored_accounts_go_on_with_the_same_bits(rule: str) -> None:
    """state() and load_state() make accounts that are the same, and stay it."""
    one, two = Run(rule=rule), Run(rule=rule)
    for run in (one, two):
        run.round(*RANKS)
    accounts = Accounts("int8", lambda _: 2, LORA.scale, keeps_all=rule == "fedex")
    restored = Ledger(two.facts, LORA, rule, None, 0, accounts)
    restored.load_state(two.ledger.state())
    two.ledger, two.server = restored, restored.pairs[SERVER]

    for run in (one, two):
        run.round("a", "c")

    first, second = one.ledger.state(), two.ledger.state()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert any(key.startswith("given:a:") for key in first)


@BOTH
def test_a_round_that_fails_leaves_the_accounts_alone(rule: str) -> None:
    """What raises an error has given nothing to anybody."""
    run = Run(rule=rule)
    run.round(*RANKS)
    before = run.ledger.state()
    bad = {n: Pair(p.a_RI * np.float32(np.inf), p.b_OR) for n, p in run.ledger.pairs["a"].items()}

    with np.errstate(all="ignore"), pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
        run.ledger.aggregate({SERVER: Report(0, 0, run.server), "a": Report(1, 8, bad)})

    after = run.ledger.state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
