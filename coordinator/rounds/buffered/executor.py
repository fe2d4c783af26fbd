"""Carry out a run in which nobody waits: begin tours, serve whoever has sent, merge, close."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from coordinator.aggregation.screening import Diverged
from coordinator.rounds.buffered.model import BufferedModel, Merged
from coordinator.rounds.buffered.run import BufferedRun
from coordinator.rounds.executor import RoundExecutor, Waves, act, robust_facts
from coordinator.rounds.plans.changes import Moved
from coordinator.rounds.state import Action, Phase
from edge_sdk.errors import NumericError


class Visiting(Waves, Protocol):
    """What is computed between two merges, as it is started here."""

    def visit(self) -> bool:
        """Run the micro-batch that came first; return whether there was one."""


class TourExecutor(RoundExecutor):
    """The acting half of a coordinator that waits for nobody."""

    _run: BufferedRun
    _learned: BufferedModel
    _waves: Visiting
    _pause_until_s: float | None = None

    def _advance_once(self, now_s: float) -> bool:
        """Do the next thing; return whether there was one."""
        state = self._run.tours
        if self._rewinds():
            return True
        if self._is_leaving:
            return self._pause(now_s)
        if self._evaluates(is_idle=not (self._run.inputs.due or self._run.inputs.uploads)):
            return True
        if state.phase is Phase.TRAINING:
            return self._take_uploads() or self._train()
        doing = {
            Action.START_ROUND: self._run.begin,
            Action.HAND_OUT: self._hand_out,
            Action.CLOSE: self._close,
        }
        return act(state.decide(), doing)

    # ---- training ----

    def _take_uploads(self) -> bool:
        """Put one of the uploads that have come into the buffer; return whether there was one."""
        if not self._run.inputs.uploads:
            return False
        run = self._run
        upload = run.inputs.uploads.popleft()
        device = upload.device
        try:
            is_retry = run.faults.num_rewinds > 0
            refused = self._learned.take(device, upload.version, upload.report, is_retry=is_retry)
        except Diverged as error:
            self._go_back(str(error))
            return True
        if not refused.devices:
            run.conduct.accepted(device)
            return True
        run.tours.num_updates -= 1
        if device in refused.proven:
            run.faults.accuse(device, NumericError(refused.proven[device]))
            self._judge()
        else:
            run.faults.set_aside(device, refused.unlike[device])
        return True

    def _train(self) -> bool:
        """Do what is due while devices are on tour; return whether there was something."""
        state = self._run.tours
        self._changes.expel_refused()
        must_merge = state.decide() is Action.AGGREGATE
        if self._learned.is_outdated:
            if self._learned.buffer.is_empty:
                self._worker.start(self._learned.renew, lambda _: None)
                return True
            must_merge = True  # what the coordinator's blocks have learned must not be lost
        if state.is_step_due or (must_merge and state.is_step_open):
            self._waves.finish_step()
        elif must_merge:
            evaluates = self._evaluates_after(state.round + 1)
            merge = partial(self._learned.merge, state.round, evaluates=evaluates)
            self._worker.start(merge, self._merged, "aggregation")
        elif not self._begin_tours():
            return self._waves.visit()
        return True

    def _begin_tours(self) -> bool:
        """Let everybody begin who is ready and on no tour; return whether there was somebody."""
        state, admission = self._run.tours, self._admission
        resting = self._run.conduct.resting(state.ready, state.round)
        fit = state.ready.keys() - resting or state.ready.keys()
        names = sorted(fit - state.members.keys())
        for name in names:
            with admission.part_of(name):
                start, tensors = self._run.begin_tour(
                    name,
                    admission.plans[name],
                    admission.held_steps.get(name, ()),
                    evaluate=self._evaluates_on_devices(state.round),
                )
                admission.send(name, start, tensors)
                admission.holds(name, start.stamp.step)
        return bool(names)

    def _merged(self, done: Merged) -> None:
        run, evaluating = self._run, self._config.evaluation.on_devices
        self._end_early(done.evaluated)
        dropped = run.merged(done.result, done.updates, evaluating=evaluating)
        facts: dict[str, Any] = {
            "samples": done.samples,
            "served": done.served,
            "cut_error": done.result.cut_error,
            "rank": max((f.rank for f in self._learned.ledger.totals.values()), default=0),
            "updates": done.updates,
        }
        if dropped:
            facts["dropped"] = dropped
        facts |= robust_facts(done.result)
        self._end_row(facts, done.evaluated)
        self._plan_again(done.reports, None, self._merge_planned)

    def _merge_planned(self, moved: Moved) -> None:
        for name, error in moved.items():
            self._changes.move(name, error)
        while self._take_uploads():
            pass
        if self._run.state.phase is Phase.TRAINING:
            self._begin_tours()  # before the checkpoint, which then knows of them
        self._save(lambda: None)

    # ---- endings ----

    def _may_leave(self, device: str) -> bool:
        """Let everybody go at once: nobody waits for a tour, which goes on from where it is."""
        return True

    def _pause(self, now_s: float) -> bool:
        """Let devices save themselves where they are, then save; return whether that is done."""
        run, state = self._run, self._run.tours
        if self._pause_until_s is None:
            self._pause_until_s = now_s + self._pausing.save_s
            run.savers.ask()
            self._ask_to_save(goes_on=False)
        if run.savers.silent and now_s < self._pause_until_s:
            return False
        while self._take_uploads():
            pass
        if state.is_step_open:
            self._waves.finish_step()
            return True
        self._leave(saves=run.state.phase is not Phase.CLOSING)
        return True
