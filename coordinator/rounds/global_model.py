"""What the run has learned: the ledger, and the coordinator's own blocks, which follow it.

It knows no network and no devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coordinator.aggregation.accounts import Accounts
from coordinator.aggregation.ledger import Ledger, Report, RoundResult
from coordinator.aggregation.limits import MAX_LEARNED, MAX_NUMBER, exceeds, largest
from coordinator.aggregation.robust import Robust
from coordinator.aggregation.rules import RULES, SERVER
from coordinator.aggregation.screening import Diverged, Refusals, Screening
from coordinator.aggregation.spectrum import energy_within
from coordinator.config.run import ServeConfig
from coordinator.engine.compute_thread import owned
from coordinator.engine.interface import DeviceFault, Engine
from coordinator.engine.server_model import ServerModel
from coordinator.export.asked.scoring import scoring_of
from coordinator.export.asked.texts import Sayings
from coordinator.planning.interface import InForce
from coordinator.rounds.step.top_gradients import TopGradients
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.exchange import moved
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import TailSums, add_up
from edge_sdk.runtime.training_state import under
from profiler.sensors.memory import return_freed


class Aggregated(NamedTuple):
    """What has come of a round."""

    result: RoundResult
    before: dict[str, dict[str, Pair]]
    """Own factors at the round's start, by participant and weight."""
    evaluated: TailSums | None
    """Loss on the coordinator's own file, where that was due."""
    refused: Refusals
    """Whose uploads were left out, and why."""


class GlobalModel:
    """The run's dW and head, in the ledger and in the coordinator's own blocks."""

    def __init__(self, config: ServeConfig, model: ServerModel, planner: InForce) -> None:
        self._config, self._model, self._planner = config, model, planner
        self._wanted: tuple[int, dict[str, int]] | None = None
        self._sayings = Sayings(config, model.source, model.tokenizer)
        self.said: list[tuple[str, str]] = []
        """Prompts, and what the model has said to them when it was last evaluated."""
        self._scoring = scoring_of(
            config, model.source, model.tokenizer, model.eval_batches, model.test_batches
        )
        self.scores: dict[str, float] = {}
        """Its scores then, where they were due."""
        self.engine: Engine = model.planned_engine()
        self.ledger = Ledger(
            model.facts,
            config.lora,
            replace(RULES[config.aggregation], server_learning_rate=config.server_learning_rate),
            config.max_rank,
            config.training.seed,
            _accounts(config),
            Robust(
                config.screening.method,
                config.screening.hostile,
                config.screening.clip,
            ),
        )
        self.engine.begin(self.ledger.enrol(SERVER, self.engine.ranks))
        self.top_gradients = TopGradients(config.screening.gradients)
        """How far devices that keep their labels may move the coordinator's blocks."""
        self.screening = Screening(
            training=config.training,
            steps_per_round=config.steps_per_round,
            total_steps=config.total_steps,
            codec=config.exchange.codec,
            scale=config.lora.scale,
            factor=config.screening.factor,
            is_ordered=config.round_mode == "synchronous",
        )

    def upload_shapes(self, plan: Plan) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Return the shapes of all that a device of *plan* uploads, and the names of the head."""
        shapes = dict(self.engine.head_shapes()) if plan.tail else {}
        head = set(shapes)
        for name, rank in plan.ranks.items():
            if rank:
                size = self._model.facts.targets[name]
                shapes[f"{name}.A"], shapes[f"{name}.B"] = size.factors(rank)
        return shapes, head

    def uploaded(
        self, device: str, plan: Plan, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, Pair]:
        """Return a device's own factors, of what it has uploaded."""
        names = [name for name, rank in plan.ranks.items() if rank]
        pairs = {name: Pair(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
        if self.ledger.accounts is None:
            return pairs
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found later
            return {name: moved(self.ledger.pairs[device][name], pairs[name]) for name in names}

    def aggregate(
        self, reports: dict[str, Report], round_: int, *, is_retry: bool, evaluates: bool
    ) -> Aggregated:
        """Join what devices and coordinator have learned.

        The coordinator's own report is added to *reports*, and what is refused is taken out.

        Args:
            reports: What the devices have brought.
            round_: Their round.
            is_retry: Whether the round is tried again, after it led to nothing good.
            evaluates: Whether what has come of it is evaluated.

        Raises:
            DeviceFault: the only device has brought what nobody can have learned; nothing was
                changed.
            ComputeFailed: what a device has brought led to an error that nobody foresaw; likewise.
            Diverged: nothing good comes of the round, and no device is to blame; likewise.
        """
        self._check_own()
        refused = self._screen(reports, round_, is_retry=is_retry)
        reports[SERVER] = Report(0, 0, *self.engine.learned())
        before = dict(self.ledger.pairs)
        result = self._join(reports)
        self._take(result)
        evaluated = self.evaluate(round_ + 1) if evaluates else None
        return Aggregated(result, before, evaluated, refused)

    def _screen(self, reports: dict[str, Report], round_: int, *, is_retry: bool) -> Refusals:
        """Take out of *reports* what is not to be joined; see `aggregate`."""
        pairs, head = self.ledger.pairs, self._head()
        brought = {
            name: self.screening.brought(report, round_, pairs[name], head)
            for name, report in reports.items()
        }
        refused = self.screening.screen(brought, is_retry=is_retry)
        for name in refused.devices:
            if len(brought) == 1:
                raise DeviceFault(name, {**refused.unlike, **refused.proven}[name])
            del reports[name]
        return refused

    def _head(self) -> Mapping[str, np.ndarray]:
        """Return the trained head that the last aggregation has left, or the model has."""
        names = self.engine.head_shapes()
        if not names or self.ledger.head:
            return self.ledger.head
        found = self._model.source.tensors("tail")
        return {name: found[name].float().numpy() for name in names if name in found}

    def _check_own(self) -> None:
        """Make sure that the coordinator's own weights are numbers that something can come of.

        Raises:
            Diverged: they are not.
        """
        if self.is_absurd():
            raise Diverged("the coordinator's own weights are beyond all measure")

    def _take(self, result: RoundResult) -> None:
        """Let the coordinator's own blocks have what an aggregation has made."""
        if self._config.evaluation.rank_energy:
            result.energy = energy_within(self.ledger.totals.values())
        replaced, changes = result.replaced.get(SERVER, {}), result.changes_for(SERVER)
        self.engine.take(changes, replaced, result.head, restarts=result.restarts)

    def _join(self, reports: dict[str, Report]) -> RoundResult:
        """Let the ledger join *reports*; see `aggregate`."""

        def works_alone(device: str) -> bool:
            try:
                self.ledger.copy().aggregate({n: reports[n] for n in (SERVER, device)})
            except Exception:  # noqa: BLE001 - that one was raised is the answer
                return False
            return True

        try:
            return self.ledger.aggregate(reports)
        except NumericError as error:
            raise Diverged(f"the aggregation: {error}") from error
        except Exception as error:
            found = owned(error, sorted(reports.keys() - {SERVER}), works_alone)
            if found is error:
                raise
            raise found from error

    def is_absurd(self) -> bool:
        """Return whether what the run has learned is beyond all measure, whoever brought it."""
        kinds = ("own:", "residual:", "head:")
        own = [a for name, a in self.engine.state().items() if name.startswith(kinds)]
        learned = self.ledger.totals.values()
        return largest(own) > MAX_NUMBER or any(exceeds(total, MAX_LEARNED) for total in learned)

    def evaluate(self, rounds_done: int) -> TailSums | None:
        """Evaluate on the coordinator's own file, if there is one.

        `said` is then new, and `scores` after as many rounds as they are due.
        """
        if self._scoring.is_due(rounds_done, self._config.rounds):
            self.scores = self._scoring.score(self.engine)
        if self._sayings:
            self.said = self._sayings.say(self.engine.continue_texts)
        batches = self._model.eval_batches
        if not batches:
            return None
        return add_up([self.engine.evaluate_whole(batch) for batch in batches])

    # ---- the engine follows the plans ----

    @property
    def is_outdated(self) -> bool:
        """Whether the coordinator's own blocks or ranks differ from what the plans leave to it."""
        first, ranks = self._planner.first, self._planner.server_ranks
        if first is None or ranks is None:
            return False
        self._wanted = first, ranks
        wanted = {name: rank for name, rank in ranks.items() if rank}
        return (first, wanted) != (self.engine.first, self.engine.ranks)

    def renew(self) -> None:
        """Hold what the plans left to the coordinator when `is_outdated` was asked.

        dW stays, and moments that still fit.
        """
        assert self._wanted is not None
        first, ranks = self._wanted
        carried = self.engine.carried()
        self._make_engine(first, ranks)
        pairs = self.ledger.enrol(SERVER, ranks)
        residuals = self.ledger.residuals(SERVER, self._model.facts.targets)
        self.engine.begin(pairs, residuals, carried)

    def _make_engine(self, first: int, ranks: Mapping[str, int]) -> None:
        """Let another engine take the place of the one that is there."""
        self.release()
        self.engine = self._model.make_engine(first, ranks)

    def release(self) -> None:
        """Let go of the coordinator's blocks: of two engines each would need the memory."""
        self.engine.close()
        del self.engine
        return_freed()

    # ---- checkpoints ----

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return everything that a restart needs."""
        state = {"engine": self.engine.state(), "ledger": self.ledger.state()}
        gradients = self.top_gradients.state()
        return {**state, "gradients": gradients} if gradients else state

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over what `state` returned, with an engine like the one at that time."""
        self.ledger.load_state(state["ledger"])
        self.top_gradients.load_state(state.get("gradients", {}))
        engine = state["engine"]
        own = {n: v for n, v in under("own:", engine).items() if n.endswith(".A")}
        ranks = {name.removesuffix(".A"): value.shape[-2] for name, value in own.items()}
        first = int(engine["first"])
        if (first, ranks) != (self.engine.first, self.engine.ranks):
            self._make_engine(first, ranks)
        self.engine.load_state(engine)


def _accounts(config: ServeConfig) -> Accounts | None:
    """Return empty accounts, where a device is not sent all that has changed as it is."""
    exchange, lora = config.exchange, config.lora
    if exchange.is_plain:
        return None
    hands_out = RULES[config.aggregation].redistribute is not None

    def most_ranks(own_rank: int) -> int | None:
        return exchange.most_ranks(own_rank or lora.r, is_returned=hands_out)

    return Accounts(exchange.codec, most_ranks, lora.scale, keeps_all=hands_out)
