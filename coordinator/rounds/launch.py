"""Put a run together, serve it, and hand out its result: what `serve` and `resume` do."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.engine.room import require_room
from coordinator.engine.server_model import ServerModel, engines
from coordinator.export.outcome import test_batches, tested, write_result
from coordinator.export.run import PEFT, read_trained, write_export
from coordinator.export.run_facts import result_checkpoint
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Left, Received
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.port import require_free_port
from coordinator.report.at_end import report_at_end
from coordinator.results.events.event import Watcher
from coordinator.results.events.run import (
    AlreadyComplete,
    Exported,
    Listening,
    Preparing,
    RunFinished,
    RunPaused,
)
from coordinator.results.events.steering import RunStopped
from coordinator.results.lifecycle import (
    ADAPTER,
    COMPLETED,
    METRICS,
    PAUSED,
    STOPPED,
    Reopened,
    has_ended,
    new_folder,
    reopened,
    require_free_name,
    restoring,
)
from coordinator.results.result_files import is_whole
from coordinator.results.run_folder import TEST_RESULTS, RunFolder
from coordinator.results.watchers import RunFiles, Watchers
from coordinator.rounds.loop import Coordinator, tell_end
from coordinator.steering.early_stopping import EarlyStopping
from coordinator.steering.listener import Listener
from coordinator.tracking.reporting import reporting
from coordinator.tracking.trackers import require_trackers
from edge_sdk.command import stopping_on_signals
from edge_sdk.deadline import Deadline
from edge_sdk.names import run_name
from edge_sdk.protocol.messages import Stamp
from edge_sdk.transport.keys import KeyPair, load_key_pair

log = logging.getLogger(__name__)

# Seconds after Ctrl-C in which a run is left, with a step of its own or in the middle of one: less
# than the 10 s after which containers are killed.
STOP_S = 8.5
# Seconds for devices that have not heard of the run's end: they are back within 5 s.
FAREWELL_S = 10.0


def serve(config: ServeConfig, watcher: Watcher, least_devices: int | None = None) -> str:
    """Start a new run and serve it to its end; return how it ended.

    Args:
        config: What to run.
        watcher: Sees what happens.
        least_devices: Devices that a round needs once a step is done; None: config.min_devices.
    """
    keys = load_key_pair(config.secret_key)
    require_trackers(config)
    require_free_name(config)
    require_free_port(config.listen)
    with (
        _model(config, watcher) as model,
        _gateway(config, keys) as gateway,
        new_folder(config) as folder,
        reporting(config, folder, watcher) as told,
        report_at_end(config, folder, told) as seen_by,
    ):
        coordinator = Coordinator(
            config, model, folder, gateway, seen_by, _new_id(folder), least_devices=least_devices
        )
        return _finish(coordinator)


def resume(path: Path, watcher: Watcher, overrides: list[str]) -> str:
    """Go on with the run at *path* as if nothing had happened; return how it ended.

    One that was killed before its first checkpoint begins anew. One that is complete needs no
    device: its result is written again where it is missing or damaged.
    """
    with reopened(path, overrides) as run:
        if _is_complete(run):
            _complete_again(run, watcher)
            return COMPLETED
        folder, config, checkpoint = run
        keys = load_key_pair(config.secret_key)
        require_trackers(config)
        require_free_port(config.listen)
        with (
            _model(config, watcher) as model,
            _gateway(config, keys) as gateway,
            reporting(config, folder, watcher) as told,
            report_at_end(config, folder, told) as seen_by,
        ):
            run_id = _new_id(folder) if checkpoint is None else run_name(checkpoint.state["run"])
            coordinator = Coordinator(config, model, folder, gateway, seen_by, run_id)
            if checkpoint is not None:
                with restoring(folder):
                    coordinator.resume(checkpoint)
            return _finish(coordinator)


@contextmanager
def _model(config: ServeConfig, watcher: Watcher) -> Iterator[ServerModel]:
    """Have the model of a run, and what makes its engines."""
    if config.engine.kind != "local":
        watcher.see(Preparing(f"engine {config.engine.kind}: {config.engine.num_actors} actors"))
    with engines(config) as make_engine:
        watcher.see(Preparing(f"reading model {config.model}"))
        model = ServerModel(config, make_engine=make_engine)
        if config.engine.kind == "local":
            require_room(model)
        yield model


def _new_id(folder: RunFolder) -> str:
    return f"{run_name(folder.name)[:64]}-{secrets.token_hex(4)}"


def _is_complete(run: Reopened) -> bool:
    """Return whether all rounds are done and the last row of metrics is complete."""
    state = {} if run.checkpoint is None else run.checkpoint.state
    done = state.get("round", -1)
    if done < run.config.rounds and not _has_ended_early(run, done):
        return False
    if state["row"] is None and not state["unevaluated"]:
        return True
    # Its coordinator was killed when it had written that row and not yet a checkpoint after it.
    return any(row.get("round") == done for row in run.folder.rows(METRICS))


def _has_ended_early(run: Reopened, done: int) -> bool:
    early = EarlyStopping(run.folder, run.config.early_stopping)
    row = {} if run.checkpoint is None else run.checkpoint.state["row"]
    return done > 0 and early.ends_at(done, row) is not None


def _complete_again(run: Reopened, watcher: Watcher) -> None:
    folder = run.folder
    watchers, target = Watchers([RunFiles(folder), watcher]), folder.path / ADAPTER
    watchers.see(AlreadyComplete(folder.path))
    if not has_ended(folder):
        _tell_the_end(run, watchers)
    config, is_there = run.config, is_whole(folder, ADAPTER)
    lacks_test = config.evaluation.test_file is not None and not folder.rows(TEST_RESULTS)
    if is_there and not lacks_test:
        return
    trained = read_trained(folder, config, result_checkpoint(folder, config))
    trained = tested(folder, config, trained, test_batches(config), watchers)
    watchers.see(Exported(ADAPTER, write_export(trained, config, target, PEFT, log.info), target))


def _tell_the_end(run: Reopened, watcher: Watcher) -> None:
    """Tell devices that the run is over: its coordinator was killed before it could.

    Those that do not come soon have been told or have left.
    """
    assert run.checkpoint is not None
    state, config, deadline = run.checkpoint.state, run.config, Deadline.after(FAREWELL_S)
    missing = set(state["devices"])
    with _gateway(config, load_key_pair(config.secret_key)) as gateway:
        watcher.see(Listening(run.folder.path, gateway.address))
        while (missing or gateway.devices()) and deadline.left_s():
            for event in gateway.events(deadline.left_s()):
                if isinstance(event, Left):
                    missing.discard(event.device)
                elif isinstance(event, Received):
                    tell_end(gateway, Stamp(run=run_name(state["run"]), device=event.device))
    watcher.see(RunFinished(COMPLETED))


def _gateway(config: ServeConfig, keys: KeyPair) -> ZmqGateway:
    return ZmqGateway(
        GatewayConfig(
            address=config.listen,
            keys=keys,
            silent_after_s=min(30.0, config.patience_s / 2),
            gone_after_s=config.patience_s,
        ),
        AllowList(config.allow_list),
    )


def _finish(coordinator: Coordinator) -> str:
    path, watcher = coordinator.folder.path, coordinator.watcher
    with Listener(path, coordinator.ask) as listener:
        watcher.see(Listening(path, coordinator.gateway.address))
        with stopping_on_signals(coordinator.stop, STOP_S):
            outcome = coordinator.serve()
        if outcome in (COMPLETED, STOPPED):
            coordinator.learned.release()  # checking the result takes memory of its own
            hand_out(coordinator)
        if outcome == STOPPED:
            watcher.see(RunStopped(path, coordinator.run.state.round, coordinator.config.rounds))
        elif outcome == PAUSED:
            watcher.see(RunPaused(path))
        listener.answer(outcome)
    return outcome


def hand_out(coordinator: Coordinator) -> None:
    """Write the result of a run, as far as there is one, and say where it is."""
    target = coordinator.folder.path / ADAPTER
    ledger, model = coordinator.learned.ledger, coordinator.model
    folder, watcher = coordinator.folder, coordinator.watcher
    difference = write_result(folder, coordinator.config, model, ledger, watcher)
    if difference is not None:
        watcher.see(Exported(ADAPTER, difference, target))
