"""One device's part in a run: answer the coordinator's messages in their order.

What a step is stands in `steps.py`. Sockets are below, in the link; threads and reconnects above,
in `client.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_sdk.accept import check_plan, check_round, check_welcome
from edge_sdk.client.callbacks import Callback, RoundBegun, RoundSummary
from edge_sdk.client.checkpoints import LocalState
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.incoming import Inbox, Redirected
from edge_sdk.client.keeping.leaving import Leaving
from edge_sdk.client.keeping.own_state import OwnState
from edge_sdk.client.profile import changed_profile, with_link
from edge_sdk.client.setup import RuntimeSetup, TokenizedData, make_batches
from edge_sdk.client.speed_drift import SpeedDrift
from edge_sdk.client.states import State
from edge_sdk.client.steps import Steps
from edge_sdk.errors import (
    EdgeError,
    RefusedError,
    public_name,
    told_text,
)
from edge_sdk.held_states import HeldStates
from edge_sdk.lora.exchange import Known
from edge_sdk.names import inside
from edge_sdk.protocol import residual
from edge_sdk.protocol.codecs import float_codecs
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    AdapterUpload,
    Failure,
    Goodbye,
    Hello,
    PartData,
    PartRequest,
    Pause,
    Paused,
    PlanAssigned,
    Profiled,
    Ready,
    RoundSkipped,
    RoundStart,
    Stamp,
    StepReport,
    Welcome,
)
from edge_sdk.protocol.plan import fingerprint
from edge_sdk.running_note import RunningNote, WasShort
from edge_sdk.runtime.interface import Runtime
from edge_sdk.transport.link import Link, package_version
from profiler.profile import DeviceProfile

if TYPE_CHECKING:  # readings of the board are no part of `import edge_sdk`
    from edge_sdk.client.board_monitor import BoardMonitor

log = logging.getLogger(__name__)

# Why a device that was told to stop leaves.
STOPPED = "stopped"
# Received messages may always have this much; what an aggregation hands out may need more.
LEAST_LIMIT_BYTES = 64 * 1024 * 1024


class Participant:
    """A device in a run, over one link; survives lost sessions."""

    def __init__(
        self,
        link: Link,
        config: ClientConfig,
        setup: RuntimeSetup,
        callback: Callback,
        stop: threading.Event,
        monitor: BoardMonitor | None = None,
    ) -> None:
        self._link, self._config, self._callback = link, config, callback
        self._setup, self._monitor = setup, monitor
        setup.say = callback.on_status
        self._prepare = ThreadPoolExecutor(1, "edgesplit-batches")
        self._inbox = Inbox(link, stop, told=callback.on_absent)
        self._leaving = Leaving(stop)
        self._inbox.look, self._inbox.mark = self._leaving.look, self._mark
        self._stamp = Stamp()
        self._welcome: Welcome | None = None
        self._assigned: PlanAssigned | None = None
        self._data: TokenizedData | None = None
        self._runtime: Runtime | None = None
        self._steps: Steps | None = None
        self._own: OwnState | None = None
        self._held: HeldStates | None = None
        """What the coordinator holds of the samples as well; for the whole run."""
        self._folder = config.state
        self._state = LocalState(config.state)
        self._measured: DeviceProfile | None = None
        self._told: DeviceProfile | None = None
        """The profile as the coordinator was last told it."""
        self._drift = SpeedDrift()
        self._unsaved: int | None = None
        """First step after the round that is under way; None where there is nothing to save."""
        self._note: RunningNote | None = None
        """None before the first welcome, and for a simulated device."""
        self._doing = ""
        """The plan in force in words, for the note."""

    def close(self) -> None:
        """Stop preparing batches; this device has ended in order."""
        self._prepare.shutdown(cancel_futures=True)
        if self._note is not None:
            self._note.remove()

    def leave_note(self) -> None:
        """Let the next start of this device say that memory was short; call it after `close`."""
        if self._note is not None and self._doing:
            self._note.write(self._doing, was_short=True)

    # ---- joining ----

    def join(self) -> None:
        """Greet the coordinator and tell it what it wants to know."""
        self._leaving.leave_round()
        welcome = self._greet()
        self._enter(welcome)
        if doing := self._take_note():
            log.info("memory.was_short doing=%s", doing)
            self._callback.on_status(f"memory was short when it last ran {doing}: asks for less")
            self.report(WasShort(f"it ended for want of memory while it ran {doing}"))
            self._enter(self._greet())
        if welcome.wants_profile:
            self._inbox.enter(State.PROFILING)
            self._link.send(Profiled(stamp=self._stamp, profile=self._profile(welcome)))
        self._inbox.enter(State.WAITING)

    def _take_note(self) -> str:
        """Return what this device ran when it ended for want of memory, untold; empty if not."""
        if self._monitor is None or self._note is not None:
            return ""  # a simulated device lives and dies with others; or it has been asked already
        self._note = RunningNote(self._folder)
        doing = self._note.short_while()  # the kernel killed it, or its link was lost with it
        self._note.remove()
        return doing

    def _greet(self) -> Welcome:
        """Say Hello until the coordinator answers."""
        self._inbox.enter(State.GREETING)
        self._link.send(
            Hello(
                stamp=self._stamp,
                protocol=PROTOCOL_VERSION,
                sdk_version=package_version(),
                codecs=(*float_codecs(), residual.RESIDUAL),
                model_hash=self._config.accept.model_hash,
                backend=self._setup.backend.name,
            )
        )
        patience_s = self._config.patience_s
        welcome: Welcome = self._inbox.wait_for(Welcome, patience_s=patience_s).message
        if welcome.protocol != PROTOCOL_VERSION:
            raise RefusedError(
                f"the coordinator speaks protocol version {welcome.protocol} (edgesplit "
                f"{welcome.sdk_version}), this device {PROTOCOL_VERSION} (edgesplit "
                f"{package_version()}); install the same version of edgesplit on both sides"
            )
        return welcome

    def _enter(self, welcome: Welcome) -> None:
        """Enter the run that *welcome* describes, if this device accepts it."""
        check_welcome(self._config.accept, welcome)
        if self._welcome != welcome:
            if self._note is not None:
                self._note.remove()
                self._note = None
            self._welcome, self._assigned, self._data = welcome, None, None
            self._held = None
        self._stamp = welcome.stamp
        self._folder = inside(self._config.state, welcome.stamp.run, welcome.stamp.device)
        LocalState(self._folder).prepare()
        self._setup.folder = self._folder
        self._callback.on_connect(welcome.stamp.run)

    def _profile(self, welcome: Welcome) -> DeviceProfile:
        """Return what this device offers, measured once: later the run takes most of its memory."""
        if self._measured is None:
            self._measured = self._setup.profile(welcome, self._ask)
        self._measured = with_link(self._measured, self._link, self._inbox, self._stamp)
        self._told = self._measured
        return self._measured

    def _adopt(self, envelope: Envelope) -> None:
        """Run another plan from now on; say so when all is in place."""
        self._inbox.enter(State.FETCHING)
        assigned: PlanAssigned = envelope.message
        assert self._welcome is not None, "a plan before a welcome"
        check_plan(self._config.accept, self._welcome, assigned)
        if assigned != self._assigned or self._runtime is None:
            self._callback.on_plan(assigned.plan)
            self._set_up(assigned)
        self._say_ready()

    def _say_ready(self) -> None:
        """Tell the coordinator what this device has, and the steps to which it can go back."""
        assert self._data is not None
        self._ready()[1].replaying.forget()
        tally = self._data.tally
        self._callback.on_status(f"ready with {len(self._data.train):,} samples, waits for a round")
        self._link.send(
            Ready(
                stamp=self._stamp,
                vocab_size=self._data.vocab_size,
                num_samples=len(self._data.train),
                held_steps=self._state.steps(),
                left_out=tally.count("skipped") + tally.count("dropped"),
                cut=tally.count("cut"),
                looks_ahead=True,
                marks=True,
                skips=True,
            )
        )

    def _set_up(self, assigned: PlanAssigned) -> None:
        welcome = self._welcome
        assert welcome is not None, "a plan before a welcome"
        self.forget()  # two slices would need twice the memory
        if self._note is not None:
            self._doing = (
                f"{assigned.plan.split} blocks, micro-batches of {assigned.plan.micro_batch}"
            )
            self._note.write(self._doing)
        if self._data is None:
            self._setup.files(welcome, self._ask)
            self._data = self._setup.data(welcome)
        seed = int(welcome.training["seed"])
        self._state = LocalState(self._folder, fingerprint(assigned.plan))
        self._batches = make_batches(self._data, assigned, seed, welcome.stamp.device)
        self._runtime = self._setup.runtime(welcome, assigned, self._ask)
        self._drift = self._drift.of_new_plan()
        welcome = replace(welcome, codec=assigned.codec or welcome.codec)
        held = self._hold(welcome)
        self._steps = Steps(self._runtime, assigned.plan, welcome, self._link, self._inbox, held)
        known = Known(welcome.exchange) if welcome.exchange else None
        self._own = OwnState(self._runtime.state, self._state, known, held)
        self._link.set_limit(max(LEAST_LIMIT_BYTES, self._runtime.most_bytes()))
        self._assigned = assigned

    def _hold(self, welcome: Welcome) -> HeldStates | None:
        """Return what is held of the samples; None where hidden states are sent whole."""
        if welcome.codec != residual.RESIDUAL:
            return None
        if self._held is None:
            path = self._folder / "held.log" if self._config.keep_held else None
            self._held = HeldStates(welcome.held_bytes, path)
        return self._held

    def forget(self) -> None:
        """Let go of the model; its checkpoints stay."""
        self._runtime = self._steps = self._own = self._assigned = None
        self._setup.return_freed()

    def _ask(self, request: PartRequest) -> Envelope:
        self._link.send(request)
        while True:
            answer = self._inbox.wait_for(PartData)
            if (answer.message.sha256, answer.message.offset) == (request.sha256, request.offset):
                return answer

    def _ready(self) -> tuple[Runtime, Steps, OwnState]:
        assert self._runtime is not None, "a round before a plan"
        assert self._steps is not None
        assert self._own is not None
        return self._runtime, self._steps, self._own

    # ---- serving ----

    def serve(self) -> None:
        """Do what the coordinator says until it closes the run.

        Raises:
            RunEnded: the run is over.
            Stopped: the application asked for it.
            SessionLost: the coordinator does not know this session any more; join again.
        """
        handlers: dict[type, Callable[[Envelope], None]] = {
            PlanAssigned: self._adopt,
            RoundStart: self._run_round,
            RoundSkipped: self._skip_round,
            Pause: self._pause,
        }
        envelope = self._inbox.wait_for()
        while True:
            try:
                handlers[type(envelope.message)](envelope)
                self._inbox.enter(State.READY)
                envelope = self._inbox.wait_for()
            except Redirected as redirected:
                envelope = redirected.envelope

    def _run_round(self, envelope: Envelope) -> None:
        self._inbox.enter(State.TRAINING)
        start: RoundStart = envelope.message
        check_round(self._config.accept, start)
        self._ready()[1].replaying.begin(start, envelope.tensors)
        self._stamp, self._unsaved = start.stamp, None
        if not self._ready()[2].begin_round(start, envelope.tensors):
            self._say_ready()
            return
        is_over = start.end_step == start.stamp.step
        self._unsaved = None if is_over else start.end_step
        holds = self._welcome is not None and self._welcome.holds
        self._leaving.enter_round(self._ask_to_leave if holds and not is_over else None)
        if start.evaluate:
            self._evaluate()
        if not is_over:
            self._train_round(start)

    def _skip_round(self, envelope: Envelope) -> None:
        """Wait: the others train this round; what they learn comes with the next start."""
        self._unsaved = None
        self._leaving.leave_round()
        self._callback.on_status(f"not in round {envelope.message.stamp.round + 1}; waiting")

    def _pause(self, _envelope: Envelope) -> None:
        self._save()
        self._callback.on_status(f"the coordinator pauses after step {self._stamp.step}; waiting")
        self._link.send(Paused(stamp=self._stamp))
        self._leaving.leave_round()

    def _mark(self, pause: Pause) -> None:
        """Save the step that the coordinator saves now, and go on with it."""
        if pause.stamp == self._stamp:  # else it has been overtaken
            self._save(goes_on=True)
            self._link.send(Paused(stamp=self._stamp))

    def _save(self, *, goes_on: bool = False) -> None:
        """Save this moment, unless all steps of the round are done: what counts is then sent."""
        if self._unsaved is not None and self._stamp.step < self._unsaved:
            self._ready()[2].save(self._stamp.step, goes_on=goes_on)

    def _ask_to_leave(self) -> None:
        log.info("round.leaving step=%d", self._stamp.step)
        self._link.send(Goodbye(stamp=self._stamp, reason=STOPPED, stays=True))

    def _evaluate(self) -> None:
        assert self._data is not None
        steps = self._ready()[1]
        if count := len(self._data.validation):
            self._callback.on_status(f"evaluating on {count:,} samples")
        self._link.send(steps.evaluate(self._data.validation, self._data.pad_id, self._stamp))

    # ---- training ----

    def _train_round(self, start: RoundStart) -> None:
        _, steps, own = self._ready()
        loss_sum, targets, stamp = 0.0, 0, start.stamp
        total_steps = int(self._welcome.training["total_steps"]) if self._welcome else 0
        begun = RoundBegun(stamp.round, stamp.step, start.end_step, total_steps)
        self._callback.on_round_start(begun)
        shift = start.schedule_step - start.stamp.step if start.schedule_step >= 0 else 0
        upcoming = self._prepare.submit(self._batches.at, start.stamp.step)
        for step in range(start.stamp.step, start.end_step):
            self._stamp = replace(start.stamp, step=step)
            batch = upcoming.result()
            upcoming = self._prepare.submit(self._batches.at, step + 1)
            report = steps.train(batch, self._stamp, batch.step + shift)
            loss_sum += report.loss * report.num_targets
            targets += report.num_targets
            self._note_pace(report)
            self._stamp = replace(start.stamp, step=step + 1)
            self._link.send(report)
            self._callback.on_step_end(report)
            if step + 1 < start.end_step:  # what is whole is handed in
                self._inbox.poll()
        upload = own.end_round(start.end_step)
        if not self._leaving.is_wanted:
            self._look_at_pace()
        importance = self._ready()[0].state.meter.take()
        self._link.send(AdapterUpload(stamp=self._stamp, importance=importance), upload)
        stats = self._link.stats()
        self._callback.on_round_end(
            RoundSummary(
                start.stamp.round,
                start.end_step,
                loss_sum / max(1, targets),
                stats.bytes_up,
                stats.bytes_down,
            )
        )

    def _note_pace(self, report: StepReport) -> None:
        """Take note of how long a step took, or that the board has changed in the middle of it."""
        if self._monitor is not None:
            self._monitor.step()
            if self._monitor.take_change():
                self._drift.begin_anew()
                return
        if self._steps is not None and self._steps.replaying.is_used:
            return  # what was not computed says nothing of how fast the board is
        self._drift.step(report.num_tokens, report.compute_s, report.wait_s)

    def _look_at_pace(self) -> None:
        """Tell the coordinator if it plans with numbers that are no longer true."""
        factor, is_link_due = self._drift.end_round()
        if self._measured is None:
            return
        # Stored at once: a new order may end the measurement of the link, which is then still due.
        by_hand = self._config.profile
        self._measured = changed_profile(self._measured, by_hand, factor, is_link_due=is_link_due)
        self._inbox.enter(State.MEASURING)
        self._measured = with_link(self._measured, self._link, self._inbox, self._stamp)
        if self._measured != self._told:
            self._told = self._measured
            self._link.send(Profiled(stamp=self._stamp, profile=self._measured))

    # ---- small things ----

    def leave(self) -> None:
        """Say goodbye; the coordinator need not wait for silence."""
        self._link.send(Goodbye(stamp=self._stamp, reason=STOPPED))

    def report(self, error: EdgeError) -> None:
        """Tell the coordinator why this device cannot go on."""
        kind = public_name(error)
        self._link.send(Failure(stamp=self._stamp, error=kind, text=told_text(error)))
