"""Who holds which factors, and what all of them together have learned.

The ledger is the coordinator's memory between rounds: with it any device can be told what to hold,
be it new, back from a crash, or just one round further. It knows no network and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from coordinator.aggregation.accounts import Accounts, Handout
from coordinator.aggregation.limits import MAX_LEARNED, exceeds
from coordinator.aggregation.robust import TRUSTING, ByWeight, Robust, Screened
from coordinator.aggregation.rules import (
    RULES,
    SERVER,
    Contribution,
    Memory,
    Rule,
    Update,
    mean_of,
    product,
    residual,
    resize_pair,
    slowed,
)
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.factors import Array, Factors, compress, condense, difference, norm, stack, zero
from edge_sdk.lora.targets import LoraConfig, ModelFacts


@dataclass(frozen=True)
class Report:
    """What one participant brings to an aggregation."""

    split: int
    """First block that the device does not train; for the coordinator, the first that it does."""
    num_samples: int
    """Samples that the device trained on in the round; not used for the coordinator."""
    pairs: Mapping[str, Pair]
    head: Mapping[str, Array] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    """Importance by weight: the mean of the measured steps of a round."""


@dataclass
class RoundResult:
    """What an aggregation hands out."""

    changes: dict[str, Factors]
    """Changes of dW by weight; the participants subtract their own progress themselves."""
    replaced: dict[str, dict[str, Pair]]
    """New own factors by participant and weight, where the rule replaces them."""
    head: dict[str, Array]
    cut_error: float
    """Largest relative error that a rank cap caused."""
    restarts: bool = False
    """Whether the optimizers begin anew as well."""
    has_residual: bool = True
    """Whether a residual completes own factors to dW; else they stand for dW themselves."""
    left_out: list[str] = field(default_factory=list)
    """Devices of which nothing was joined, as those of `screening.method: krum`."""
    clipped: list[str] = field(default_factory=list)
    """Devices that count with a part of what they have moved."""
    energy: list[float] = field(default_factory=list)
    """As `energy_within` of dW, where that is wanted."""
    handouts: dict[str, Handout] = field(default_factory=dict)
    """What each device is given of the changes, where less than all travels."""

    def changes_for(self, participant: str) -> dict[str, Factors]:
        """Return the changes that *participant* is to add to its residuals, by weight."""
        own = {} if self.has_residual else self.replaced.get(participant, {})
        return {weight: f for weight, f in self.changes.items() if weight not in own}


class Ledger:
    """Factors of every participant at the start of the round, dW, and the trained head."""

    def __init__(
        self,
        facts: ModelFacts,
        lora: LoraConfig,
        rule: str | Rule,
        max_rank: int | None,
        seed: int,
        accounts: Accounts | None = None,
        robust: Robust = TRUSTING,
    ) -> None:
        self.accounts = accounts
        """What devices have been given; None where all that has changed travels as it is."""
        self.robust = robust
        """How the contributions of a few are kept from deciding for all."""
        self._facts, self._lora, self._seed = facts, lora, seed
        self._rule = RULES[rule] if isinstance(rule, str) else rule
        self._max_rank = max_rank
        self.totals: dict[str, Factors] = {}
        """dW by weight, scale inside, where it is not zero: what the run has learned so far."""
        self.pairs: dict[str, dict[str, Pair]] = {}
        """Own factors by participant (SERVER or device name) and weight."""
        self.shared: dict[str, Factors] = {}
        """Factors that everybody goes on with, by weight, scale inside, where the rule has such."""
        self._dealt_from: dict[tuple[str, int], tuple[Factors, Pair]] = {}
        """What was handed out last, by weight and rank, after what it was made of."""
        self._drawn: dict[tuple[str, int], tuple[int, Pair]] = {}
        """What was drawn last, by weight and rank, after its seed."""
        self.head: dict[str, Array] = {}
        self._memory: dict[str, Memory] = {}
        """What the rule's server optimizer remembers, by weight."""
        self.rounds = 0
        """Aggregations so far."""

    @property
    def restarts(self) -> bool:
        """Whether every round begins with fresh factors and optimizers."""
        return self._rule.restarts

    def enrol(self, participant: str, ranks: Mapping[str, int]) -> dict[str, Pair]:
        """Return the own factors that *participant* is to hold, resized or drawn where needed."""
        held = self.pairs.get(participant, {})
        if self.accounts is not None:
            known = {name: pair.a_RI.shape[-2] for name, pair in held.items()}
            if known != {n: rank for n, rank in ranks.items() if rank}:
                self.accounts.close(participant)
            elif participant in self.accounts.given:  # these, and what was given, make dW
                return held
        self.pairs[participant] = {
            name: self._own(name, rank, held.get(name)) for name, rank in ranks.items() if rank
        }
        return self.pairs[participant]

    def _own(self, name: str, rank: int, held: Pair | None) -> Pair:
        if name in self._handed_out:  # also for those who missed rounds
            return self._dealt(name, rank)
        if held is None:
            return self._fresh(name, rank)
        before = held.a_RI.shape[-2]
        if before == rank:
            return held
        ratio = self._lora.scale(name, before) / self._lora.scale(name, rank)
        return resize_pair(held, self._fresh(name, rank), ratio)

    @property
    def _handed_out(self) -> Mapping[str, Factors]:
        """What new factors are made of, by weight, scale inside; empty where they are drawn."""
        if self._rule.redistribute is None:
            return {}
        return self.shared if self._rule.has_residual else self.totals

    def _dealt(self, name: str, rank: int) -> Pair:
        """Return the factors of a rank that are handed out; all of that rank share the arrays."""
        source = self._handed_out[name]
        known = self._dealt_from.get((name, rank))
        if known is None or known[0] is not source:
            assert self._rule.redistribute is not None
            scale = self._lora.scale(name, rank)
            known = source, self._rule.redistribute(source, self._fresh(name, rank), scale)
            self._dealt_from[name, rank] = known
        return known[1]

    def _fresh(self, name: str, rank: int) -> Pair:
        """Draw factors, once for all; a rule that restarts draws other ones in each round."""
        seed = self._seed + self.rounds * self._rule.restarts
        known = self._drawn.get((name, rank))
        if known is None or known[0] != seed:
            known = seed, initial_pair(name, rank, self._facts.targets[name], seed)
            self._drawn[name, rank] = known
        return known[1]

    def residuals(self, participant: str, weights: Iterable[str]) -> dict[str, Factors]:
        """Return dW minus what the participant's own adapter already adds, by weight."""
        own = self.pairs.get(participant, {})
        if not self._rule.has_residual:
            return {n: self.totals[n] for n in weights if n in self.totals and n not in own}
        return {
            name: residual(
                self.totals[name], self._product(name, own[name]) if name in own else None
            )
            for name in weights
            if name in self.totals
        }

    def _product(self, weight: str, pair: Pair) -> Factors:
        return product(pair, self._lora.scale(weight, pair.a_RI.shape[-2]))

    def copy(self) -> Ledger:
        """Return a ledger that goes its own way from here; the numbers are shared."""
        other = copy(self)
        other.totals, other.pairs = dict(self.totals), dict(self.pairs)
        other.shared, other._memory = dict(self.shared), dict(self._memory)
        other.accounts = self.accounts and self.accounts.copy()
        return other

    def aggregate(self, reports: Mapping[str, Report]) -> RoundResult:
        """Join the round's reports; the ledger then holds the state of the next round's start.

        What raises an error has changed nothing.

        Raises:
            ConfigError: the rule does not allow the reported ranks.
            NumericError: what comes of them is not finite.
        """
        with self._unchanged_by_errors():
            self.rounds += 1
            screened = self.screened(
                {w: self._contributions(w, reports) for w in self._facts.targets}
            )
            kept = {n: r for n, r in reports.items() if n not in screened.left_out}
            result = self._combine(screened, self._join_heads(kept))
            for name, report in reports.items():
                ranks = {weight: pair.a_RI.shape[-2] for weight, pair in report.pairs.items()}
                self.pairs[name] = dict(report.pairs)
                if self._rule.restarts or self._rule.redistribute is not None:
                    held = {} if self._rule.restarts else report.pairs
                    self.pairs[name] = {w: self._own(w, r, held.get(w)) for w, r in ranks.items()}
                    result.replaced[name] = self.pairs[name]
            self._check(result)
            if self.accounts is not None:
                result.handouts = self._settle(self.accounts, reports)
            return result

    def screened(self, contributions: ByWeight) -> Screened:
        """Return what is to be joined of *contributions*, after whatever `robust` does to them."""
        return self.robust(contributions)

    def add(
        self,
        screened: Screened,
        pairs: Mapping[str, Pair],
        head: Mapping[str, Array],
    ) -> RoundResult:
        """Add what came in to dW, whenever it began; what raises an error has changed nothing.

        Args:
            screened: What `screened` has left of the contributions of `buffer.py`.
            pairs: The coordinator's own factors by now.
            head: The trained head by now; empty where nobody has one.

        Raises:
            NumericError: what comes of them is not finite.
        """
        with self._unchanged_by_errors():
            self.rounds += 1
            result = self._combine(screened, dict(head))
            self.pairs[SERVER] = dict(pairs)
            self._check(result)
            return result

    @contextmanager
    def _unchanged_by_errors(self) -> Iterator[None]:
        before = self.copy()
        try:
            yield
        except BaseException:
            self.totals, self.pairs, self.head = before.totals, before.pairs, before.head
            self.shared, self._memory, self.rounds = before.shared, before._memory, before.rounds
            self.accounts = before.accounts
            raise

    def _settle(self, accounts: Accounts, reports: Mapping[str, Report]) -> dict[str, Handout]:
        """Give every device of the round a part of what it lacks."""
        devices = {name: reports[name] for name in sorted(reports) if name != SERVER}
        total = sum(report.num_samples for report in devices.values())
        accounts.close_others(devices)
        handouts = {}
        for name, report in devices.items():
            moves, self.pairs[name] = accounts.move(report.pairs, self.pairs[name])
            handouts[name] = accounts.settle(
                name,
                self._facts.weights(0, report.split),
                self.totals,
                self.pairs[name],
                report.num_samples / total if total else 0.0,
            )._replace(moves=moves)
        return handouts

    def _combine(self, screened: Screened, head: dict[str, Array]) -> RoundResult:
        """Join what there is of each weight into dW."""
        contributions = screened.contributions
        result = RoundResult({}, {}, head, 0.0)
        result.left_out, result.clipped = screened.left_out, screened.clipped
        result.restarts = self._rule.restarts
        result.has_residual = self._rule.has_residual
        for weight, shape in self._facts.targets.items():
            if found := contributions.get(weight):
                found = slowed(found, self._rule.server_learning_rate)
                update = self._rule.join(found, shape, self._max_rank)
                self._note(weight, self._bounded(weight, update, found), result)
        return result

    def _bounded(
        self, weight: str, update: Update, contributions: Mapping[str, Contribution]
    ) -> Update:
        """Return what keeps dW of a weight in as many ranks as the rule allows."""
        if not self._rule.bounds_rank or update.change is None:
            return update
        shape = self._facts.targets[weight]
        together = sum(c.after.a_RI.shape[-2] for c in contributions.values())
        old = self.totals.get(weight) or zero(*shape)
        most = self._max_rank or max(old.rank, together)
        if most >= min(shape.num_outputs, shape.num_inputs):  # nothing that could be cut
            return replace(update, change=compress(update.change)[0])
        total, error = compress(stack([old, update.change]), most)
        change = difference(total, old) if error else compress(update.change)[0]
        cut = error * norm(total) / norm(change) if error else 0.0
        return replace(update, total=total, change=change, cut_error=cut)

    def _check(self, result: RoundResult) -> None:
        """Take over the head, if all of *result* is finite, and of a size that can be."""
        self.head = result.head or self.head
        for name, array in _numbers(result, self.totals, self.shared):
            if not np.isfinite(array).all():
                raise NumericError(f"what the round has made of {name} is not finite")
        for name in result.changes:
            if exceeds(self.totals[name], MAX_LEARNED):
                raise NumericError(f"what the run has learned of {name} is beyond all measure")

    def _contributions(self, weight: str, reports: Mapping[str, Report]) -> dict[str, Contribution]:
        """Count every sample once: for a device that holds the block, else for the coordinator."""
        block = self._facts.block_of(weight)
        found: dict[str, Contribution] = {}
        devices = {n: r for n, r in reports.items() if n != SERVER}
        total = sum(r.num_samples for r in devices.values())
        left_over = sum(r.num_samples for r in devices.values() if r.split <= block)
        for name, report in reports.items():
            samples = left_over if name == SERVER else report.num_samples
            if weight not in report.pairs or not samples:
                continue
            after, before = report.pairs[weight], self.pairs[name][weight]
            scale = self._lora.scale(weight, after.a_RI.shape[-2])
            found[name] = Contribution(samples / total, scale, before, after, device=name)
        return found

    def _note(self, weight: str, update: Update, result: RoundResult) -> None:
        result.cut_error = max(result.cut_error, update.cut_error)
        if update.shared is not None:
            self.shared[weight] = update.shared
        old = self.totals.get(weight) or zero(*self._facts.targets[weight])
        if self._rule.server_optimizer is not None:
            change = update.change if update.total is None else residual(update.total, old)
            assert change is not None, "a rule gives the total or the change"
            memory = self._memory.get(weight, {})
            change, self._memory[weight] = self._rule.server_optimizer(change, memory)
            update = Update(change=change)
        if update.total is not None:
            self.totals[weight] = update.total
            result.changes[weight] = update.change or residual(update.total, old)
        elif update.change is not None:
            result.changes[weight] = update.change
            self.totals[weight] = condense(old, [update.change])

    def _join_heads(self, reports: Mapping[str, Report]) -> dict[str, Array]:
        """Return the mean of a trained head over those who hold it, weighted by samples."""
        devices = {n: r for n, r in reports.items() if n != SERVER}
        holders = {n: r.head for n, r in reports.items() if r.head}
        if not holders:
            return {}
        elsewhere = sum(r.num_samples for r in devices.values() if not r.head)
        samples = {n: reports[n].num_samples if n != SERVER else elsewhere for n in holders}
        total = sum(samples.values())
        weight = {n: s / total for n, s in samples.items()} if total else {}
        used = {n: head for n, head in holders.items() if weight.get(n)}
        keys = next(iter(holders.values()))
        counted = self.robust.heads(used, self.head)
        return {k: mean_of({n: h[k] for n, h in counted.items()}, weight) for k in keys}

    def global_factors(self) -> dict[str, Factors]:
        """Return dW of every trained weight, scale inside: what the run has learned so far."""
        return dict(self.totals)

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as flat arrays, for a checkpoint.

        Of factors that are drawn or handed out, which all of a rank share, only the rank.
        """
        state: dict[str, np.ndarray] = {"rounds": np.array(self.rounds)}
        for who, pairs in self.pairs.items():
            for name, pair in pairs.items():
                rank = pair.a_RI.shape[-2]
                if pair is self._own(name, rank, None):
                    state[f"common:{who}:{name}"] = np.array(rank)
                else:
                    state |= {f"pair:{who}:{name}.A": pair.a_RI, f"pair:{who}:{name}.B": pair.b_OR}
        for kind, held in (("total", self.totals), ("shared", self.shared)):
            for name, factors in held.items():
                state |= {f"{kind}:{name}.A": factors.a_RI, f"{kind}:{name}.B": factors.b_OR}
        if self.accounts is not None:
            state |= self.accounts.state()
        for name, memory in self._memory.items():
            state |= {f"memory:{name}:{key}": value for key, value in memory.items()}
        return state | {f"head:{name}": value for name, value in self.head.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned; without a memory, the server optimizer begins anew."""
        self.totals, self.shared, self.pairs, self.head = {}, {}, {}, {}
        memory: dict[str, dict[str, Array]] = {}
        common: list[tuple[str, str, int]] = []
        self.rounds = int(state["rounds"])
        for key, a in state.items():
            kind, _, rest = key.partition(":")
            if kind == "head":
                self.head[rest] = a
            elif kind == "common":
                who, _, name = rest.rpartition(":")
                common.append((who, name, int(a)))
            elif kind == "memory":
                weight, _, name = rest.rpartition(":")
                memory.setdefault(weight, {})[name] = a
            if kind not in ("pair", "total", "shared") or not key.endswith(".A"):
                continue
            b = state[f"{key[:-1]}B"]
            who, _, name = rest.removesuffix(".A").rpartition(":")
            if kind == "pair":
                self.pairs.setdefault(who, {})[name] = Pair(a, b)
            else:
                held = self.totals if kind == "total" else self.shared
                held[name] = Factors(b, a)
        for who, name, rank in common:  # after what they are made of
            self.pairs.setdefault(who, {})[name] = self._own(name, rank, None)
        self._memory = dict(memory)
        if self.accounts is not None:
            self.accounts.load_state(state)


def _numbers(result: RoundResult, *sums: Mapping[str, Factors]) -> Iterator[tuple[str, Array]]:
    """Yield all arrays that an aggregation makes, each with the weight it belongs to."""
    # Participants of one rank may hold the very same arrays.
    own = {id(pair): (w, pair) for pairs in result.replaced.values() for w, pair in pairs.items()}
    made = [item for factors in (result.changes, *sums) for item in factors.items()]
    for weight, (first, second) in (*made, *own.values()):
        yield weight, first
        yield weight, second
    yield from result.head.items()
