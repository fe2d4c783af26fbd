"""One run: its parts put together, and the event loop that moves it on.

Messages come in (`handlers.py`), `state.py` decides what to do next, and that is carried out
(`executor.py`, `waves.py`). Who may take part is decided in `admission.py`; what is computed runs
in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

from coordinator.aggregation.round_start import RoundStartBuilder
from coordinator.aggregation.versions import VersionedStart
from coordinator.config.run import ServeConfig
from coordinator.engine.compute_thread import Inline, Worker
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Gateway, Received
from coordinator.gateway.link_probe import Probing
from coordinator.gateway.replays import Replays
from coordinator.gateway.residuals import Residuals
from coordinator.planning.run_planner import Planner
from coordinator.results.events.event import Watcher
from coordinator.results.events.run import (
    Preparing,
    RunFinished,
    RunStarted,
    StopAsked,
    WeightsAdapted,
)
from coordinator.results.lifecycle import COMPLETED, CUT_SHORT, OVER, STOPPED
from coordinator.results.metrics import Reporting
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.results.standing.observed import Computed, ModelKnown
from coordinator.results.watchers import RunFiles, Watchers
from coordinator.rounds.admission import Admission
from coordinator.rounds.buffered.executor import TourExecutor
from coordinator.rounds.buffered.handlers import TourHandler
from coordinator.rounds.buffered.model import BufferedModel
from coordinator.rounds.buffered.run import BufferedRun
from coordinator.rounds.buffered.tours import BufferedState, tour_debts
from coordinator.rounds.buffered.visits import VisitRunner
from coordinator.rounds.checkpoints import Checkpoints
from coordinator.rounds.executor import RoundExecutor, Tellers
from coordinator.rounds.global_model import GlobalModel
from coordinator.rounds.handlers import MessageHandler
from coordinator.rounds.intake.parts import Parts
from coordinator.rounds.members.selection import Selection
from coordinator.rounds.plans.changes import PlanChanges
from coordinator.rounds.plans.desk import PlanningDesk
from coordinator.rounds.progress import Waits
from coordinator.rounds.run import Run
from coordinator.rounds.state import Debt, RunState, debts
from coordinator.rounds.validation import WaveInput
from coordinator.rounds.waves import WaveRunner
from coordinator.steering.early_stopping import EarlyStopping
from coordinator.steering.wishes import URGENT, Wish
from edge_sdk.deadline import Deadline
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import PartRequest, RunOver, Stamp

# Folder of hidden states that are held of the devices' samples, in the run's folder.
HELD = "held"
# Folder of the hidden states that frozen blocks have computed, in the run's folder.
KEPT_STATES = "kept-states"
# Seconds after which the loop comes round at the latest, to notice silence and Ctrl-C.
POLL_S = 0.5
# Seconds for the last words to all devices.
GOODBYE_S = 35.0


Kept = tuple[Residuals, Replays]


@dataclass(frozen=True)
class RoundForm:
    """The parts of a run that depend on whether its rounds have a barrier."""

    model: type[GlobalModel]
    handler: type[MessageHandler]
    waves: type[WaveRunner]
    executor: type[RoundExecutor]
    owed: Callable[[RunState], dict[str, Debt]]
    make_run: Callable[
        [str, ServeConfig, int | None, GlobalModel, ServerModel, Reporting, Kept], Run
    ]
    """Takes the run's name, its config, the devices that are enough once a step is done, what is
    learned, the model, who is told, and what will hold the devices' hidden states."""


def _synchronous(
    run_id: str,
    config: ServeConfig,
    least_devices: int | None,
    learned: GlobalModel,
    model: ServerModel,
    reporting: Reporting,
    kept: Kept,
) -> Run:
    state = RunState(
        total_rounds=config.rounds,
        steps_per_round=config.steps_per_round,
        min_devices=config.min_devices,
        labels_on_device=config.labels == "device",
        wave_tokens=config.most_wave_tokens,
        least_devices=least_devices,
        per_round=config.devices_per_round,
    )
    starts = RoundStartBuilder(learned.ledger, model.facts)
    selection = Selection(config.devices_per_round, config.training.seed)
    return Run(run_id, state, starts, reporting, *kept, selection)


def _buffered(
    run_id: str,
    config: ServeConfig,
    least_devices: int | None,
    learned: GlobalModel,
    model: ServerModel,
    reporting: Reporting,
    kept: Kept,
) -> Run:
    own = config.buffered
    state = BufferedState(
        total_rounds=config.rounds,
        steps_per_round=config.steps_per_round,
        min_devices=config.min_devices,
        labels_on_device=config.labels == "device",
        size=own.size,
        max_staleness=own.max_staleness,
    )
    starts = VersionedStart(learned.ledger, model.facts, own.max_staleness + 1)
    return BufferedRun(run_id, state, starts, reporting, *kept)


FORMS = {
    "synchronous": RoundForm(
        GlobalModel, MessageHandler, WaveRunner, RoundExecutor, debts, _synchronous
    ),
    "buffered": RoundForm(
        BufferedModel, TourHandler, VisitRunner, TourExecutor, tour_debts, _buffered
    ),
}
"""By `round_mode`."""


class Coordinator:
    """One run, from its first device to its last round."""

    _told: Wish | None = None

    def __init__(
        self,
        config: ServeConfig,
        model: ServerModel,
        folder: RunFolder,
        gateway: Gateway,
        watcher: Watcher,
        run_id: str,
        *,
        pool: Executor | None = None,
        least_devices: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Put a run together.

        Args:
            config: What to run.
            model: What is trained.
            folder: The run's own files.
            gateway: How to reach the devices; whoever opened it closes it.
            watcher: Sees what happens, after the folder's files.
            run_id: Name of the run in every message.
            pool: Where the coordinator computes; None: in a thread of its own.
            least_devices: Devices that a round needs once a step is done; None: config.min_devices.
            clock: Seconds by which devices are late; where it stands still nobody is.
        """
        self.config, self.model, self.folder, self.gateway = config, model, folder, gateway
        self.watcher = Watchers([RunFiles(folder), watcher])
        reporting = Reporting(self.watcher, bool(config.label_names), gateway)
        self.planner = Planner(config, model.facts, model.planning_problem())
        desk = self._desk = PlanningDesk(self.planner, gateway.wake, pool and Inline())
        form = FORMS[config.round_mode]
        self.learned = form.model(config, model, desk)
        about = self.learned, model, reporting, _kept_states(config, folder)
        self.run = form.make_run(run_id, config, least_devices, *about)
        self.admission = Admission(config, model, gateway, desk, self.run, self.watcher)
        changes = self._changes = PlanChanges(config, gateway, self.run, self.admission, desk)
        takers = self.run, self.admission, changes, self.learned
        handlers = self._handlers = form.handler(*takers, _limits(config, model), Probing(gateway))
        self.admission.allowance.clock = clock
        self._parts = Parts(model, gateway, self.admission, pool and Inline())
        self._worker = Worker(gateway.wake, pool, self._tell_computed)
        keep, early = config.save_total_limit, EarlyStopping(folder, config.early_stopping)
        saved = self._checkpoints = Checkpoints(folder, keep, self.run, self.learned, desk, early)
        waves = form.waves(self.run, self.admission, self.learned, self._worker, handlers.handle)
        tellers = Tellers(self.admission, changes)
        self._executor = form.executor(
            config, self.run, tellers, self.learned, saved, waves, self._worker
        )
        self._clock, self._waits = clock, Waits(config, self.run, gateway, desk, form.owed)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from *checkpoint* in a new process: rows written after it are dropped."""
        self._checkpoints.resume(checkpoint)

    def serve(self) -> str:
        """Serve until the run is over or `stop` was called; return how it ended."""
        run, executor = self.run, self._executor
        self._handlers.add(PartRequest, self._parts.ask)
        executor.begin()
        self.watcher.see(WeightsAdapted(self.model.coverage))
        if self.model.needs_ids:
            self.watcher.see(Preparing("later blocks need the token ids: devices send all of them"))
        self.watcher.see(ModelKnown(self.model.facts.layout.num_blocks))
        self.watcher.see(RunStarted(run.id, run.state.step))
        try:
            while not executor.outcome:
                for event in self.gateway.events(POLL_S):
                    self._handlers.handle(event)
                self._parts.pump()
                self._changes.plan_next()
                self.admission.assign_waiting()
                executor.collect()
                self._tell_of_stop()
                self._waits.look(self._clock(), is_computing=executor.is_busy)
                executor.advance(self._clock())
                self.watcher.turn()
        finally:
            self._worker.close()
            self._desk.close()
            self._parts.close()
            self.model.graphs.close()
            run.replays.close()
        self.watcher.see(RunFinished(executor.outcome))
        if executor.outcome in (COMPLETED, STOPPED):
            self._say_goodbye(OVER if executor.outcome == COMPLETED else CUT_SHORT)
        return executor.outcome

    def _tell_computed(self, what: str, devices: Sequence[str], seconds: float) -> None:
        self.watcher.see(Computed(what, devices, seconds))

    def _tell_of_stop(self) -> None:
        """Say once of each wish that the run is to be left."""
        wish = self._executor.wish
        if wish is not None and wish is not self._told:
            self._told = wish
            self.watcher.see(StopAsked(wish.kind, wish.after_round, wish.is_urgent))

    def _say_goodbye(self, reason: str) -> None:
        """End all sessions, once everybody knows that the run is over.

        After a pause there is no goodbye: devices keep trying, and join the run that is resumed.
        """
        gateway, deadline = self.gateway, Deadline.after(GOODBYE_S)
        names = set(gateway.devices())
        for name in names:
            with suppress(PeerGone):
                gateway.drop(name, self._executor.outcome)
        while not names.isdisjoint(gateway.devices()) and deadline.left_s():
            for event in gateway.events(min(POLL_S, deadline.left_s())):
                if isinstance(event, Received):  # of a new session: it has not heard of the end
                    tell_end(gateway, self.run.stamp(event.device), reason)

    def stop(self) -> None:
        """Leave at the end of the step, with a checkpoint; any thread may call this."""
        self.ask(URGENT)

    def ask(self, wish: Wish) -> None:
        """Leave as is wished, with a checkpoint; any thread may call this."""
        self._executor.wish = wish
        self.gateway.wake()


def tell_end(gateway: Gateway, stamp: Stamp, reason: str = OVER) -> None:
    """Tell the device of *stamp*, if it is still here, that the run is over; end its session."""
    with suppress(PeerGone):
        gateway.send(stamp.device, RunOver(stamp=stamp, reason=reason))
        gateway.drop(stamp.device, COMPLETED)


def _limits(config: ServeConfig, model: ServerModel) -> WaveInput:
    return WaveInput(
        model.facts.layout.width,
        model.text_config.vocab_size,
        len(config.label_names),
        model.max_length,
        config.labels,
        wants_ids=model.facts.layout.needs_ids,
    )


def _kept_states(config: ServeConfig, folder: RunFolder) -> Kept:
    """Return what will hold the devices' hidden states: to send changes, or nothing again."""
    held = folder.path / HELD if config.keep_held else None
    replay = config.replay
    path = folder.path / KEPT_STATES if replay.applies(config.labels) else None
    return Residuals(config.held_bytes, held), Replays(path, replay.max_bytes, replay.dtype)
