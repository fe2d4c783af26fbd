"""Carry out what `state.py` decides: start rounds, run waves, aggregate, pause, close."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.rules import SERVER
from coordinator.engine.compute_thread import Worker
from coordinator.engine.interface import Answer, DeviceFault
from coordinator.gateway.interface import Received
from coordinator.planning.run_planner import changed
from coordinator.results.events import (
    ImportanceMeasured,
    PlanMade,
    RoundAbandoned,
    RoundStarted,
    StepSkipped,
    WaitEnded,
)
from coordinator.rounds.handlers import MessageHandler
from coordinator.rounds.pausing import Pausing
from coordinator.rounds.run import Run
from coordinator.rounds.state import Action, Phase
from edge_sdk.errors import NumericError, PeerGone
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import EvalResult, Gradient, Message, Pause, RunOver, TopHidden
from edge_sdk.runtime.interface import TailSums

log = logging.getLogger(__name__)

COMPLETED, PAUSED = "completed", "paused"


class RoundExecutor:
    """The acting half of the coordinator."""

    def __init__(self, run: Run, handlers: MessageHandler, worker: Worker) -> None:
        self.run, self._handlers, self._worker = run, handlers, worker
        self.outcome = ""
        """How the run ended; empty while it goes on."""
        self.stop_asked = False
        self._pruned: list[str] = []
        """Devices that have cut ranks off in the round that is being joined."""
        self._pausing = Pausing(run, handlers)
        self._await_until_s = time.monotonic() + run.config.patience_s

    def collect(self) -> None:
        """Take results of computations; a device that spoilt one is expelled, the others go on."""
        try:
            self._worker.collect()
        except DeviceFault as fault:
            self._handlers.expel(fault.device, fault)

    def advance(self) -> None:
        """Do all that can be done now."""
        while not self.outcome and not self._worker.is_busy and self._advance_once():
            pass

    def _advance_once(self) -> bool:
        """Do the next thing; return whether there was one."""
        run = self.run
        if run.must_rewind:
            run.watcher.see(RoundAbandoned(run.state.round))
            run.restore(run.folder.load_checkpoint())
            self._handlers.move_outdated()
        if self._pausing.is_begun:
            return self._end_if(self._pausing.finish())
        if run.state.phase is Phase.GATHERING and run.is_engine_outdated:
            self._worker.start(run.renew_engine, lambda _: None)
            return True
        if run.inputs.evals:
            return self._evaluate()
        if run.state.awaited and time.monotonic() >= self._await_until_s:
            run.watcher.see(WaitEnded(sorted(run.state.awaited)))
            run.state.stop_waiting()
        action = run.state.decide()
        if self.stop_asked and self._pausing.can_begin(action):
            for name in list(run.state.members):
                self._send(name, Pause(stamp=self._stamp(name)))
            return self._end_if(self._pausing.begin())
        doing = {
            Action.START_ROUND: self._start_round,
            Action.RUN_WAVE: self._run_wave,
            Action.FORWARD: self._forward,
            Action.BACKWARD: self._backward,
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
        run.inputs.jobs, run.inputs.grads, run.inputs.early, run.inputs.reports = {}, {}, {}, {}
        run.reporting.begin_round()
        names, boards = sorted(run.state.members), run.reporting.boards()
        run.watcher.see(RoundStarted(run.state.round, run.state.attempt, names, boards))
        for name in list(run.state.members):
            self._send_round(name, step, run.state.end_step)

    def _send_round(self, device: str, step: int, end_step: int) -> None:
        run, state = self.run, self.run.state
        row = run.reporting.pending
        has_evaluated = row is None or device in row.get("eval_by_device", {})
        start, tensors = run.round_start.message(
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
        """Return the steps of this round at which the device could go on by itself."""
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
        reports = {name: run.inputs.reports[name] for name in run.state.members}
        self._worker.start(partial(self._join, reports), partial(self._round_done, reports))

    def _join(self, reports: dict[str, Report]) -> tuple[RoundResult, TailSums | None]:
        """Join the reports and evaluate; this runs in the worker's thread."""
        engine, ledger = self.run.engine, self.run.ledger
        reports[SERVER] = Report(0, 0, *engine.learned())
        self._pruned = self.run.planner.prune(ledger.pairs, reports)
        result = ledger.aggregate(reports)
        replaced, changes = result.replaced.get(SERVER, {}), result.changes_for(SERVER)
        engine.take(changes, replaced, result.head, restarts=result.restarts)
        return result, self.measure(self.run.state.round + 1)

    def end_row(self, facts: dict[str, Any], evaluated: TailSums | None) -> None:
        """Open the row of what is done so far; it waits for devices that evaluate as well."""
        run, state = self.run, self.run.state
        run.reporting.end_round(state.round, state.step, facts, evaluated)
        if not (run.config.evaluation.on_devices and self._is_due(state.round)):
            run.reporting.flush()

    def measure(self, rounds_done: int) -> TailSums | None:
        """Evaluate the global model on the coordinator's own file, if one is due."""
        batches = self.run.model.eval_batches
        if not batches or not self._is_due(rounds_done):
            return None
        sums = [self.run.engine.evaluate_whole(batch) for batch in batches]
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
        run.round_start.round_ended(result, members)
        run.reporting.telemetry(run.state.round)
        run.state.finish_round(evaluating=members if run.config.evaluation.on_devices else set())
        facts = {
            "samples": sum(reports[name].num_samples for name in members),
            "cut_error": result.cut_error,
            "rank": max((f.rank for f in run.ledger.totals.values()), default=0),
        }
        self.end_row(facts, evaluated)
        run.inputs.reports = {}
        moved = self._plan_again(reports)
        run.save()
        if importance := run.planner.importance:
            run.watcher.see(ImportanceMeasured(run.state.round, dict(importance)))
        for name in moved:
            self._handlers.move(name)
        if moved:
            self._await_until_s = time.monotonic() + run.config.patience_s

    def _plan_again(self, reports: dict[str, Report]) -> list[str]:
        """Let the planner see the round; return the devices that are to run something else."""
        run, state = self.run, self.run.state
        old = {} if run.planner.plans is None else run.planner.plans.plans
        decision = run.planner.round_ended(state.round, reports, run.gateway.devices())
        if decision is None:
            return [] if state.round == state.total_rounds else self._pruned
        importance = run.planner.importance
        run.watcher.see(PlanMade(state.round, decision.plans, decision.reasons, importance))
        is_last = state.round == state.total_rounds
        return [] if is_last else changed(old, decision.plans.plans)

    # ---- waves ----

    def _run_wave(self) -> None:
        state = self.run.state
        jobs = [self.run.inputs.jobs[name] for name in state.expected()]
        compute = partial(self.run.engine.train, jobs, state.step, state.micro)
        self._worker.start(compute, partial(self._answer_wave, state.attempt))

    def _forward(self) -> None:
        state = self.run.state
        jobs = [self.run.inputs.jobs[name] for name in state.expected()]
        compute = partial(self.run.engine.forward, jobs, state.step, state.micro)
        self._worker.start(compute, partial(self._send_final_hidden, state.attempt))

    def _send_final_hidden(self, attempt: int, final_hidden: dict[str, Array]) -> None:
        state = self.run.state
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        state.finish_forward()
        for name, hidden_BTD in final_hidden.items():
            if not np.isfinite(hidden_BTD).all():
                fault = NumericError("the blocks cannot take what it sent: not finite")
                self._handlers.expel(name, fault)
            elif name in state.members:
                message = TopHidden(stamp=self._stamp(name), micro=state.micro)
                self._send(name, message, {"hidden": self._coded(name, hidden_BTD)})

    def _backward(self) -> None:
        state = self.run.state
        grads = {name: self.run.inputs.grads[name] for name in state.expected()}
        compute = partial(self.run.engine.backward, grads)
        self._worker.start(compute, partial(self._answer_wave, state.attempt))

    def _answer_wave(self, attempt: int, answers: list[Answer]) -> None:
        """Send gradients first: while devices go backward, the engine updates its adapters."""
        state = self.run.state
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        for answer in answers:
            if not np.isfinite(answer.grad_BTD).all():
                # Nor is the engine's own: `finish_step` leaves its adapters alone, once.
                fault = NumericError("the gradient of what it sent is not finite")
                self._handlers.expel(answer.device, fault)
            elif answer.device in state.members:
                loss_sum = answer.sums.loss_sum if answer.sums else 0.0
                message = Gradient(
                    stamp=self._stamp(answer.device), micro=state.micro, loss_sum=loss_sum
                )
                grad = {"grad": self._coded(answer.device, answer.grad_BTD)}
                is_frozen = self.run.admission.plans[answer.device].is_forward_only
                self._send(answer.device, message, {} if is_frozen else grad)
        if state.phase is not Phase.TRAINING:
            return
        self.run.inputs.jobs, self.run.inputs.grads = {}, {}
        is_last = not any(m.num_micro > state.micro + 1 for m in state.members.values())
        if is_last:
            compute = partial(self.run.engine.finish_step, state.step)
            self._worker.start(compute, partial(self._wave_done, attempt))
        else:
            self._wave_done(attempt, True)

    def _wave_done(self, attempt: int, was_finite: bool) -> None:
        state = self.run.state
        if not was_finite:
            self.run.watcher.see(StepSkipped(state.step))
        if attempt != state.attempt or state.phase is not Phase.TRAINING:
            return
        state.finish_wave()
        early, self.run.inputs.early = self.run.inputs.early, {}
        for name, envelopes in early.items():
            for where in sorted(envelopes):
                self._handlers.handle(Received(name, envelopes[where]))

    def _coded(self, device: str, array: Array) -> TensorOut:
        return array, self.run.admission.codecs[device]

    # ---- evaluation ----

    def _evaluate(self) -> bool:
        evals, self.run.inputs.evals = self.run.inputs.evals, []
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

    def _end_if(self, is_paused: bool) -> bool:
        self.outcome = PAUSED if is_paused else ""
        return is_paused or not self._pausing.is_begun

    def _hand_out(self) -> None:
        """Send the last aggregation to everybody who was in it, to be evaluated."""
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
