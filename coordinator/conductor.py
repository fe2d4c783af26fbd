"""Carry out what `rounds.py` decides: start rounds, run waves, aggregate, pause, close."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from coordinator.aggregation import SERVER
from coordinator.gateway import Received
from coordinator.intake import Intake
from coordinator.ledger import Report, RoundResult
from coordinator.rounds import Action, Phase
from coordinator.run import Run
from coordinator.wave import Answer, DeviceFault
from coordinator.worker import Worker
from edge_sdk.assembly import TensorOut
from edge_sdk.errors import NumericError, PeerGone
from edge_sdk.factors import Array
from edge_sdk.messages import EvalResult, Gradient, Message, Pause, RunOver, TopHidden
from edge_sdk.runtime import Micro, TailSums

log = logging.getLogger(__name__)

# Seconds that devices get to checkpoint themselves when the coordinator is about to leave.
PAUSE_PATIENCE_S = 15.0
COMPLETED, PAUSED = "completed", "paused"


class Conductor:
    """The acting half of the coordinator."""

    def __init__(self, run: Run, intake: Intake, worker: Worker) -> None:
        self.run, self._intake, self._worker = run, intake, worker
        self.outcome = ""
        """How the run ended; empty while it goes on."""
        self.stop_asked = False
        self._pause_until_s: float | None = None
        self._await_until_s = time.monotonic() + run.config.patience_s

    def collect(self) -> None:
        """Take results of computations; a device that spoilt one is expelled, the rest goes on."""
        try:
            self._worker.collect()
        except DeviceFault as fault:
            self._intake.expel(fault.device, fault)

    def advance(self) -> None:
        """Do all that can be done now."""
        while not self.outcome and not self._worker.is_busy and self._advance_once():
            pass

    def _advance_once(self) -> bool:
        """Do the next thing; returns whether there was one."""
        run = self.run
        if run.must_rewind:
            run.watcher.note(f"round {run.state.round} starts again: too few devices are left")
            run.restore(run.folder.load_checkpoint())
        if self._pause_until_s is not None:
            return self._finish_pause()
        if run.mail.evals:
            return self._evaluate()
        if run.state.awaited and time.monotonic() >= self._await_until_s:
            absent = ", ".join(sorted(run.state.awaited))
            run.watcher.note(f"going on without {absent}: not back yet")
            run.state.stop_waiting()
        action = run.state.decide()
        if self.stop_asked and self._can_pause(action):
            return self._begin_pause()
        doing = {
            Action.START_ROUND: self._start_round,
            Action.RUN_WAVE: self._run_wave,
            Action.LIFT: self._lift,
            Action.LOWER: self._lower,
            Action.AGGREGATE: self._aggregate,
            Action.HAND_OUT: self._hand_out,
            Action.CLOSE: self._close,
        }
        if action is Action.WAIT:
            return False
        doing[action]()
        return True

    def _send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] | None = None
    ) -> None:
        try:
            self.run.gateway.send(device, message, tensors or {})
        except PeerGone as gone:
            self.run.lose(device, str(gone))

    def _stamp(self, device: str) -> Any:
        state = self.run.state
        return self.run.admission.stamp(device, state.round, state.step, state.attempt)

    # ---- rounds ----

    def _start_round(self) -> None:
        run = self.run
        step = run.state.step  # a round that needs no waves is at its end at once
        run.state.start_round()
        run.mail.jobs, run.mail.grads, run.mail.early, run.mail.reports = {}, {}, {}, {}
        run.reporting.begin_round()
        run.reporting.event(
            "round.started",
            round=run.state.round,
            attempt=run.state.attempt,
            devices=sorted(run.state.members),
        )
        for name in list(run.state.members):
            self._send_round(name, step, run.state.end_step)

    def _send_round(self, device: str, step: int, end_step: int) -> None:
        run, state = self.run, self.run.state
        row = run.reporting.pending
        has_evaluated = row is None or device in row.get("eval_by_device", {})
        start, tensors = run.handout.message(
            run.admission.stamp(device, state.round, step, state.attempt),
            end_step,
            run.admission.plans[device],
            self._held(device),
            evaluate=run.config.evaluation.on_devices
            and not has_evaluated
            and self._is_due(run.state.round),
        )
        self._send(device, start, tensors)
        run.admission.holds(device, step)
        if start.restore_step < 0:
            state.begins[device] = step

    def _held(self, device: str) -> tuple[int, ...]:
        """Steps of this round at which the device could go on by itself."""
        state = self.run.state
        held = self.run.admission.held_steps.get(device, ())
        return tuple(step for step in held if state.first_step <= step <= state.end_step)

    def _is_due(self, rounds_done: int) -> bool:
        config = self.run.config
        return rounds_done in (0, config.rounds) or (
            rounds_done % config.evaluation.every_rounds == 0
        )

    def _aggregate(self) -> None:
        run = self.run
        reports = {name: run.mail.reports[name] for name in run.state.members}
        self._worker.start(partial(self._join, reports), partial(self._round_done, reports))

    def _join(self, reports: dict[str, Report]) -> tuple[RoundResult, TailSums | None]:
        """Aggregate and evaluate; runs in the worker's thread."""
        engine, ledger = self.run.engine, self.run.ledger
        own = Report(0, 0, engine.adapters.pairs(), engine.head_values())
        result = ledger.aggregate({SERVER: own, **reports})
        engine.take(result.changes, result.replaced[SERVER], ledger.means, result.head)
        return result, self.measure(self.run.state.round + 1)

    def measure(self, rounds_done: int) -> TailSums | None:
        """Evaluate the global model on the coordinator's own file, if one is due."""
        batches = self.run.model.eval_batches
        if not batches or not self._is_due(rounds_done):
            return None
        sums = [self.run.engine.whole(Micro(b.input_ids, b.lengths, b.labels)) for b in batches]
        return TailSums(
            sum(s.loss_sum for s in sums),
            sum(s.num_targets for s in sums),
            sum(s.num_correct for s in sums),
        )

    def _round_done(
        self, reports: dict[str, Report], done: tuple[RoundResult, TailSums | None]
    ) -> None:
        run = self.run
        if run.must_rewind:
            return
        result, evaluated = done
        members = set(run.state.members)
        run.handout.round_ended(result, members)
        run.reporting.telemetry(run.state.round, run.gateway)
        run.state.finish_round(evaluating=members if run.config.evaluation.on_devices else set())
        facts = {
            "samples": sum(report.num_samples for report in reports.values()),
            "cut_error": result.cut_error,
            "rank": max((f.rank for f in run.ledger.totals.values()), default=0),
        }
        run.reporting.end_round(run.state.round, run.state.step, facts, evaluated)
        run.mail.reports = {}
        run.save()

    # ---- waves ----

    def _run_wave(self) -> None:
        state = self.run.state
        jobs = [self.run.mail.jobs[name] for name in state.expected()]
        compute = partial(self.run.engine.train, jobs, state.step, state.micro)
        self._worker.start(compute, partial(self._answer_wave, state.attempt))

    def _lift(self) -> None:
        state = self.run.state
        jobs = [self.run.mail.jobs[name] for name in state.expected()]
        compute = partial(self.run.engine.lift, jobs, state.step, state.micro)
        self._worker.start(compute, partial(self._send_tops, state.attempt))

    def _send_tops(self, attempt: int, tops: dict[str, Array]) -> None:
        state = self.run.state
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        state.finish_lift()
        for name, top_BTD in tops.items():
            if not np.isfinite(top_BTD).all():
                fault = NumericError("the blocks cannot take what it sent: not finite")
                self._intake.expel(name, fault)
            elif name in state.members:
                message = TopHidden(stamp=self._stamp(name), micro=state.micro)
                self._send(name, message, {"hidden": self._coded(name, top_BTD)})

    def _lower(self) -> None:
        state = self.run.state
        grads = {name: self.run.mail.grads[name] for name in state.expected()}
        compute = partial(self.run.engine.lower, grads)
        self._worker.start(compute, partial(self._answer_wave, state.attempt))

    def _answer_wave(self, attempt: int, answers: list[Answer]) -> None:
        """Gradients go out first; then, behind the devices' own backward, our optimizer."""
        state = self.run.state
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        for answer in answers:
            if not np.isfinite(answer.grad_BTD).all():
                # Our own is not finite either: `finish_step` leaves our adapters alone, once.
                fault = NumericError("the gradient of what it sent is not finite")
                self._intake.expel(answer.device, fault)
            elif answer.device in state.members:
                loss_sum = answer.sums.loss_sum if answer.sums else 0.0
                message = Gradient(
                    stamp=self._stamp(answer.device), micro=state.micro, loss_sum=loss_sum
                )
                grad = self._coded(answer.device, answer.grad_BTD)
                self._send(answer.device, message, {"grad": grad})
        if state.phase is not Phase.TRAINING:
            return
        self.run.mail.jobs, self.run.mail.grads = {}, {}
        is_last = not any(m.num_micro > state.micro + 1 for m in state.members.values())
        if is_last:
            compute = partial(self.run.engine.finish_step, state.step)
            self._worker.start(compute, partial(self._wave_done, attempt))
        else:
            self._wave_done(attempt, True)

    def _wave_done(self, attempt: int, was_finite: bool) -> None:
        state = self.run.state
        if not was_finite:
            step = state.step
            self.run.reporting.event("step.skipped", step=step, reason="gradient not finite")
            self.run.watcher.note(f"step {step}: a gradient was not finite; our adapters wait")
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        state.finish_wave()
        early, self.run.mail.early = self.run.mail.early, {}
        for name, envelope in early.items():
            self._intake.handle(Received(name, envelope))

    def _coded(self, device: str, array: Array) -> TensorOut:
        return array, self.run.admission.codecs[device]

    # ---- evaluation ----

    def _evaluate(self) -> bool:
        evals, self.run.mail.evals = self.run.mail.evals, []
        compute = partial(self._evaluate_all, [job for _, job in evals])
        self._worker.start(compute, partial(self._answer_evals, [m for m, _ in evals]))
        return True

    def _evaluate_all(self, jobs: list[Any]) -> list[tuple[str, TailSums | Array]]:
        return [(job.device, self.run.engine.evaluate(job)) for job in jobs]

    def _answer_evals(
        self, messages: list[Any], results: list[tuple[str, TailSums | Array]]
    ) -> None:
        for message, (device, found) in zip(messages, results, strict=True):
            if isinstance(found, TailSums):
                answer = EvalResult(stamp=message.stamp, micro=message.micro, **found._asdict())
                self._send(device, answer)
            else:
                top = TopHidden(stamp=message.stamp, micro=message.micro, is_eval=True)
                self._send(device, top, {"hidden": self._coded(device, found)})

    # ---- endings ----

    def _can_pause(self, action: Action) -> bool:
        """Between two steps, or where there is nothing else to do."""
        state = self.run.state
        if state.phase in (Phase.GATHERING, Phase.CLOSING):
            # A round that can start does: devices then save what the last one has taught them.
            return action is Action.WAIT
        is_between = state.micro == 0 and not state.is_lifted
        return is_between if state.phase is Phase.TRAINING else self._has_local()

    def _has_local(self) -> bool:
        """Whether a member trains steps of its own, that nobody else can stop at."""
        return any(member.is_local for member in self.run.state.members.values())

    def _begin_pause(self) -> bool:
        state = self.run.state
        if not state.members:
            self.outcome = PAUSED
            return True
        self._intake.paused = set()
        self._pause_until_s = time.monotonic() + PAUSE_PATIENCE_S
        self.run.watcher.note(f"stopping at step {state.step}; devices save their state")
        for name in list(state.members):
            self._send(name, Pause(stamp=self._stamp(name)))
        return True

    def _finish_pause(self) -> bool:
        """Save this very step; where members train alone, the round's start has to do."""
        assert self._pause_until_s is not None
        state = self.run.state
        is_complete = self._intake.paused >= state.members.keys()
        if not is_complete and time.monotonic() < self._pause_until_s:
            return False
        if state.step > state.safe_step and not self._has_local():
            self.run.save()
        self.outcome = PAUSED
        return True

    def _hand_out(self) -> None:
        """Give the last aggregation to everybody who was in it, to be evaluated."""
        state = self.run.state
        state.is_handed_out = True
        for name in list(state.awaiting_eval):
            self._send_round(name, state.step, state.step)

    def _close(self) -> None:
        run = self.run
        run.reporting.flush()
        for name in run.gateway.devices():
            self._send(name, RunOver(stamp=self._stamp(name), reason="the run is complete"))
        self.outcome = COMPLETED
