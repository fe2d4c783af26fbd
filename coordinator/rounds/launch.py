"""Put a run together, serve it, and hand out its result: what `serve` and `resume` do."""

from __future__ import annotations

import secrets
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.allow_list import AllowList
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.results.events import Exported, Listening, RunPaused, Watcher
from coordinator.results.lifecycle import ADAPTER, COMPLETED, new_folder, reopen, restoring
from coordinator.rounds.loop import Coordinator
from edge_sdk.command import stopping_on_signals
from edge_sdk.transport.keys import KeyPair, load_key_pair


def serve(config: ServeConfig, watcher: Watcher, least_devices: int | None = None) -> str:
    """Start a new run and serve it to its end; return how it ended.

    Args:
        config: What to run.
        watcher: Sees what happens.
        least_devices: Devices that a round needs once a step is done; None: config.min_devices.
    """
    keys = load_key_pair(config.secret_key)
    model = ServerModel(config)
    with _gateway(config, keys) as gateway, new_folder(config) as folder:
        run_id = f"{folder.name}-{secrets.token_hex(4)}"
        coordinator = Coordinator(
            config, model, folder, gateway, watcher, run_id, least_devices=least_devices
        )
        return _finish(coordinator)


def resume(path: Path, watcher: Watcher, overrides: list[str]) -> str:
    """Go on with the run at *path* as if nothing had happened; return how it ended."""
    folder, config, checkpoint = reopen(path, overrides)
    keys = load_key_pair(config.secret_key)
    model = ServerModel(config)
    with _gateway(config, keys) as gateway:
        run_id = checkpoint.state["run"]
        coordinator = Coordinator(config, model, folder, gateway, watcher, run_id)
        with restoring(folder):
            coordinator.resume(checkpoint)
        return _finish(coordinator)


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
    watcher.see(Listening(path, coordinator.gateway.address))
    with stopping_on_signals(coordinator.stop):
        outcome = coordinator.serve()
    if outcome == COMPLETED:
        target = path / ADAPTER
        watcher.see(Exported(ADAPTER, coordinator.learned.export(target), target))
    else:
        watcher.see(RunPaused(path))
    return outcome
