"""Carry out what `state.py` decides: start rounds, run waves, aggregate, pause, close."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.screening import Diverged, Refusals
from coordinator.config.run import ServeConfig
from coordinator.engine.compute_thread import Worker
from coordinator.engine.interface import ComputeFailed, DeviceFault
from coordinator.results.events.rounds import RoundAbandoned
from coordinator.results.events.steering import EndedEarly, SampleText
from coordinator.results.lifecycle import COMPLETED, CUT_SHORT, OVER, STOPPED
from coordinator.results.run_folder import Checkpoint
from coordinator.rounds.admission import Admission
from coordinator.rounds.checkpoints import Checkpoints
from coordinator.rounds.global_model import Aggregated, GlobalModel
from coordinator.rounds.marking import Marking
from coordinator.rounds.pausing import Pausing
from coordinator.rounds.plans.changes import Moved, Pairs, PlanChanges
from coordinator.rounds.run import Run
from coordinator.rounds.state import Action, Phase, may_leave
from coordinator.steering.wishes import Wish
from edge_sdk.errors import NumericError
from edge_sdk.protocol.messages import Pause
from edge_sdk.runtime.interface import TailSums

# Times in a row that a run goes back because of a round of which nothing good comes.
MOST_REWINDS = 2


class Waves(Protocol):
    """What is computed between two aggregations, as it is started here."""

    def run_wave(self) -> None:
        """Run a wave whose labels are here, forward and backward."""

    def forward(self) -> None:
        """Run the forward half of a wave whose labels stay on the devices."""

    def backward(self) -> None:
        """Run the backward half of a wave whose labels stay on the devices."""

    def finish_step(self) -> None:
        """Update the coordinator's adapters."""

    def evaluate(self) -> None:
        """Run all micro-batches that devices want to have evaluated."""


class Tellers(NamedTuple):
    """Those who tell devices what to do."""

    admission: Admission
    changes: PlanChanges


def act(action: Action, doing: Mapping[Action, Callable[[], object]]) -> bool:
    """Do what *doing* says of *action*; return whether it was more than to wait."""
    if action is Action.WAIT:
        return False
    doing[action]()
    return True


def robust_facts(result: RoundResult) -> dict[str, Any]:
    """Return what a row says of an aggregation where there is anything to say.

    That is whom `screening` names, and the energy of dW by rank.
    """
    said = {
        "left_out": result.left_out,
        "clipped": result.clipped,
        "rank_energy": result.energy,
    }
    return {key: values for key, values in said.items() if values}


class RoundExecutor:
    """The acting half of the coordinator."""

    def __init__(
        self,
        config: ServeConfig,
        run: Run,
        tellers: Tellers,
        learned: GlobalModel,
        checkpoints: Checkpoints,
        waves: Waves,
        worker: Worker,
    ) -> None:
        self._config, self._run = config, run
        self._admission, self._changes = tellers
        self._learned, self._checkpoints = learned, checkpoints
        self._waves, self._worker = waves, worker
        self.outcome = ""
        """How the run ended; empty while it goes on."""
        self.wish: Wish | None = None
        """How the run is to be left; any thread may write it."""
        self._is_leaving = self._has_evaluated = False
        self._pausing = Pausing(run, config.patience_s)
        self._marking, self._is_marked = Marking(run, config.save_every_s), False
        """How rounds are saved on their way, and whether the checkpoint of that is written."""
        self._is_planning = False
        """Whether the run cannot go on before plans are made."""

    @property
    def is_busy(self) -> bool:
        """Whether the coordinator does something that everything else has to wait for."""
        return self._worker.is_busy or self._is_planning

    def begin(self) -> None:
        """Evaluate and save what is there before the first round, unless that is done."""
        if not self._checkpoints:
            self._end_row({}, self._learned.evaluate(0))
            self._worker.at_once(self._checkpoints.moment())
            self._run.saved()

    def collect(self) -> None:
        """Take results of computations; a device that spoilt one leaves, the others go on.

        Raises:
            NumericError: again and again nothing good comes of a round, and no device is to blame.
        """
        try:
            self._worker.collect()
        except DeviceFault as fault:
            self._run.faults.accuse(fault.device, fault)
        except Diverged as error:
            self._go_back(str(error))
        except ComputeFailed as failed:
            with self._admission.part_of(failed.device):
                raise failed.error from None
        if not self.is_busy:
            self._judge()

    def _judge(self) -> None:
        """Expel those of whose part nothing finite has come, unless it is no fault of their own.

        It is none where what all have learned is the reason. Where several are accused at once the
        round is tried again, if possible without them.
        """
        accused = self._run.faults.take_accused()
        if not accused:
            return
        first = sorted(accused)[0]
        if self._learned.is_absurd():
            self._go_back(f"{accused[first]}, but what all have learned is beyond all measure")
        elif len(accused) > 1 and not self._run.faults.num_rewinds:
            for name in accused:
                self._run.conduct.spare(name, self._run.state.round)
            self._go_back(f"{len(accused)} devices at once; {first}: {accused[first]}")
        else:
            for name in sorted(accused):
                self._admission.expel(name, accused[name])

    def _go_back(self, reason: str) -> None:
        """Give the round up, and blame nobody.

        Raises:
            NumericError: that has been done too often.
        """
        if self._run.faults.num_rewinds >= MOST_REWINDS:
            raise NumericError(
                f"the run has diverged: {reason}; go back to an older checkpoint, or lower "
                "training.learning_rate"
            )
        self._run.faults.give_up_round(reason)

    # ---- what the loop does not wait for ----

    def _aside(
        self, work: Callable[[], Any], then: Callable[[Any], None], what: str = "checkpoint"
    ) -> None:
        """Let the compute thread work; *then* gets the result, at once where that is there."""
        self._worker.start(work, then, what)
        self._worker.collect()

    def _save(self, then: Callable[[], None], *, goes_on: bool = False) -> None:
        """Save this moment; *then* the run goes on, with what has come of the step if it does."""

        def saved(_: None) -> None:
            self._run.saved()
            then()

        self._aside(self._checkpoints.moment(goes_on=goes_on), saved)

    def _leave(self, *, saves: bool) -> None:
        """Let the run end as one that can be resumed.

        Args:
            saves: Whether to save this moment first, unless what was learned meanwhile is nothing
                to go on with.
        """
        if not saves:
            self._left()
            return
        write = self._checkpoints.moment()

        def save() -> None:
            if not self._learned.is_absurd():
                write()

        self._aside(save, lambda _: self._left())

    def _left(self) -> None:
        """Let the run be over before its time, as it was wanted."""
        self.outcome = self._pausing.outcome
        if self.outcome == STOPPED:
            self._run.reporting.flush()
            self._admission.end(CUT_SHORT)

    def advance(self, now_s: float) -> None:
        """Do all that can be done now, in seconds of a clock that never goes back."""
        if (wish := self.wish) is not None:
            self._is_leaving = self._pausing.ask(wish, now_s)
        self._let_go()
        while not self.outcome and not self.is_busy and self._advance_once(now_s):
            pass

    def _advance_once(self, now_s: float) -> bool:
        """Do the next thing; return whether there was one."""
        state = self._run.state
        if self._is_marked:
            self._is_marked = False
            self._marking.saved(now_s)
        if self._rewinds():
            return True
        if self._pausing.is_begun:
            return self._leaves_if(self._pausing.is_over(now_s))
        if self._marking.is_begun and not (self._is_leaving and self._pausing.is_late(now_s)):
            return self._marks_if(self._marking.is_over(now_s))
        if state.phase is Phase.GATHERING:
            self._changes.expel_refused()
            if self._learned.is_outdated:
                self._worker.start(self._learned.renew, lambda _: None)
                return True
        action = state.decide()
        if self._evaluates(is_idle=action is Action.WAIT):
            return True
        if self._is_leaving:
            if self._pausing.can_begin(action):
                self._ask_to_save(goes_on=False)
                if self._pausing.begin(now_s):
                    self._left()
                return not self._pausing.is_begun
            if self._pausing.is_forced(now_s):
                self._left()
                return True
        elif self._marking.is_due(now_s):
            self._marking.begin(now_s)
            self._ask_to_save(goes_on=not self._marking.leavers)
            return True
        doing = {
            Action.START_ROUND: self._start_round,
            Action.RUN_WAVE: self._waves.run_wave,
            Action.FORWARD: self._waves.forward,
            Action.BACKWARD: self._waves.backward,
            Action.FINISH_STEP: self._waves.finish_step,
            Action.AGGREGATE: self._aggregate,
            Action.HAND_OUT: self._hand_out,
            Action.CLOSE: self._close,
        }
        return act(action, doing)

    def _evaluates(self, *, is_idle: bool) -> bool:
        """Evaluate a micro-batch of each device that waits for it, in turn with everything else.

        Args:
            is_idle: Whether there is nothing else to do.
        """
        if not self._run.evaluations or (self._has_evaluated and not is_idle):
            self._has_evaluated = False
            return False
        self._has_evaluated = True
        self._waves.evaluate()
        return True

    # ---- members leave, and rounds are saved on their way ----

    def _let_go(self) -> None:
        """Let members go that want to, where that costs the round nothing, or nothing more."""
        run = self._run
        for device, reason in list(run.leavers.items()):
            if self._may_leave(device):
                self._admission.send(device, Pause(stamp=run.stamp(device)))
                run.lose(device, reason, counts=True)

    def _may_leave(self, device: str) -> bool:
        return may_leave(self._run.state, device, self._run.leavers)

    def _ask_to_save(self, *, goes_on: bool) -> None:
        for name in sorted(self._run.savers.due):
            self._admission.send(name, Pause(stamp=self._run.stamp(name), goes_on=goes_on))

    def _marks_if(self, is_over: bool) -> bool:
        """Save the round where its members have; return whether the run can go on."""
        if not is_over:
            return False
        if self._marking.end():
            members = list(self._run.state.members)
            then = partial(self._marked, members, self._run.state.step)
            self._save(then, goes_on=not self._marking.leavers)
        elif self._marking.leavers:
            self._run.holding.let_go(self._marking.leavers)
        return True

    def _marked(self, members: list[str], step: int) -> None:
        for name in members:
            self._admission.holds(name, step)
        self._is_marked = True

    # ---- rounds ----

    def _rewinds(self) -> bool:
        """Go back to the last checkpoint, if the round was given up; return whether it was."""
        if self._run.must_rewind:
            if not self._run.holding.is_held:  # of the other it has been told
                self._run.watcher.see(RoundAbandoned(self._run.state.round))
            self._aside(self._checkpoints.newest, self._rewind)
            return True
        return False

    def _rewind(self, checkpoint: Checkpoint) -> None:
        def planned() -> None:
            self._is_planning = False
            self._checkpoints.rewind(checkpoint)

        self._is_planning = True
        self._changes.rewind(checkpoint.state["planner"], planned)

    def _start_round(self) -> None:
        state = self._run.state
        step = state.step  # a round that needs no waves is at its end at once
        for name in self._run.start_round():
            self._admission.skip_round(name)
        for name in list(state.members):
            self._send_round(name, step, state.end_step)

    def _send_round(self, device: str, step: int, end_step: int) -> None:
        with self._admission.part_of(device):
            self._tell_round(device, step, end_step)

    def _tell_round(self, device: str, step: int, end_step: int) -> None:
        admission, rounds_done = self._admission, self._run.state.round
        start, tensors = self._run.round_start(
            replace(self._run.stamp(device), step=step),
            end_step,
            admission.plans[device],
            admission.held_steps.get(device, ()),
            evaluate=self._evaluates_on_devices(rounds_done),
        )
        admission.send(device, start, tensors)
        admission.holds(device, step)

    def _evaluates_after(self, rounds_done: int) -> bool:
        """Return whether the model is evaluated then; always where the run is to end there."""
        is_last = rounds_done == self._run.state.total_rounds
        return is_last or self._config.evaluates_after(rounds_done)

    def _evaluates_on_devices(self, rounds_done: int) -> bool:
        return self._config.evaluation.on_devices and self._evaluates_after(rounds_done)

    def _aggregate(self) -> None:
        state = self._run.state
        reports = {name: self._run.inputs.reports[name] for name in state.members}
        compute = partial(
            self._learned.aggregate,
            reports,
            state.round,
            is_retry=self._run.faults.num_rewinds > 0,
            evaluates=self._evaluates_after(state.round + 1),
        )
        self._worker.start(compute, partial(self._round_done, reports), "aggregation")

    def _end_row(self, facts: dict[str, Any], evaluated: TailSums | None) -> None:
        """Open the row of what is done so far; it waits for devices that evaluate as well."""
        state, reporting = self._run.state, self._run.reporting
        scores, self._learned.scores = self._learned.scores, {}
        reporting.end_round(state.round, state.step, facts, evaluated, scores)
        said, self._learned.said = self._learned.said, []
        for prompt, text in said:
            self._run.watcher.see(SampleText(state.round, prompt, text))
        if not self._evaluates_on_devices(state.round):
            reporting.flush()

    def _end_early(self, evaluated: TailSums | None) -> None:
        """Let the round that is done be the last one, if nothing better is to be expected."""
        early, reporting, done = self._checkpoints.early, self._run.reporting, self._run.state.round
        if not early.config.is_on:
            return
        reporting.flush()  # whoever had to evaluate the round before has done so by now
        row: dict[str, Any] = {"round": done + 1}
        if evaluated is not None:
            row["eval"] = reporting.score(evaluated)
        if (verdict := early.ends_at(done + 1, row)) is not None:
            self._run.total_rounds = done + 1
            best = verdict.best_round
            metric = early.config.metric_for_best_model
            self._run.watcher.see(EndedEarly(done, verdict.rounds_without, metric, best))

    def _round_done(self, reports: dict[str, Report], done: Aggregated) -> None:
        run = self._run
        if run.must_rewind:
            return
        refused = done.refused
        for name in refused.devices:
            run.faults.set_aside(name, {**refused.unlike, **refused.proven}[name])
        members = set(run.state.members)
        self._end_early(done.evaluated)
        run.finish_round(done.result, evaluating=self._config.evaluation.on_devices)
        facts: dict[str, Any] = {
            "samples": sum(reports[name].num_samples for name in members),
            "cut_error": done.result.cut_error,
            "rank": max((f.rank for f in self._learned.ledger.totals.values()), default=0),
        }
        if handouts := done.result.handouts:
            facts["lag"] = max(handout.lag for handout in handouts.values())
            facts["lag_by_device"] = {name: handouts[name].lag for name in sorted(handouts)}
        if replayed := run.replays.take_replayed():
            facts["replayed"] = replayed
        if run.cut_off.devices:
            facts["cut_off"] = sorted(run.cut_off.devices)
        if refused.devices:
            facts["refused"] = refused.devices
        facts |= robust_facts(done.result)
        self._end_row(facts, done.evaluated)
        self._plan_again(reports, done.before, partial(self._round_planned, refused))

    def _plan_again(
        self, reports: dict[str, Report], before: Pairs | None, then: Callable[[Moved], None]
    ) -> None:
        """Let others run something else from now on, if that is better; *then* the run goes on."""

        def planned(moved: Moved) -> None:
            self._is_planning = False
            then(moved)

        self._is_planning = True
        self._changes.plan_again(reports, before, planned)

    def _round_planned(self, refused: Refusals, moved: Moved) -> None:
        self._save(partial(self._round_saved, refused, moved))

    def _round_saved(self, refused: Refusals, moved: Moved) -> None:
        self._changes.tell_importance()
        for name, error in moved.items():
            self._changes.move(name, error)
        for name, why in sorted(refused.proven.items()):
            self._admission.expel(name, NumericError(why))

    # ---- endings ----

    def _leaves_if(self, is_over: bool) -> bool:
        """Leave where devices have saved themselves, or do not; return whether that is so."""
        if is_over:
            self._leave(saves=self._pausing.is_worth_saving)
        return is_over

    def _hand_out(self) -> None:
        """Send the last aggregation to everybody who was in it, to be evaluated."""
        step = self._run.state.step
        for name in self._run.hand_out():
            self._send_round(name, step, step)

    def _close(self) -> None:
        self._run.reporting.flush()
        self._save(self._end)  # whoever resumes it finds the last row complete

    def _end(self) -> None:
        is_cut_short = self._pausing.is_cut_short
        self._admission.end(CUT_SHORT if is_cut_short else OVER)
        self.outcome = STOPPED if is_cut_short else COMPLETED
