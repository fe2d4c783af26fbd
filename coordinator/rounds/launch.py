"""Put a run together, serve it, and hand out its result: what `serve` and `resume` do."""

from __future__ import annotations

import json
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.allow_list import AllowList
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.results.events import Exported, Listening, RunPaused
from coordinator.results.export import export_adapter
from coordinator.results.run_folder import CONFIG, RunFolder
from coordinator.results.watchers import Watcher
from coordinator.rounds.executor import COMPLETED
from coordinator.rounds.loop import Coordinator
from coordinator.rounds.run import Run
from edge_sdk.command import stopping_on_signals
from edge_sdk.config.describe import dump_config
from edge_sdk.config.loader import load_config
from edge_sdk.errors import StorageError
from edge_sdk.transport.keys import load_key_pair

PACKAGES = ("edgesplit", "torch", "transformers", "peft", "pyzmq", "msgpack", "numpy")
ADAPTER = "adapter"


def serve(config: ServeConfig, watcher: Watcher, least_devices: int | None = None) -> str:
    """Start a new run and serve it to its end; return how it ended.

    Args:
        config: What to run.
        watcher: Sees what happens.
        least_devices: Devices that a round needs once a step is done; None: config.min_devices.
    """
    keys = load_key_pair(config.secret_key)
    model = ServerModel(config)
    with _gateway(config, keys) as gateway:
        folder = RunFolder.create(config.runs, config.name)
        with removed_if_it_never_began(folder):
            folder.write_text(CONFIG, dump_config(config))
            folder.write_text("env.json", json.dumps(environment(), indent=2))
            run_id = f"{folder.name}-{secrets.token_hex(4)}"
            run = Run(config, model, folder, gateway, watcher, run_id, least_devices)
            return _finish(run)


def resume(path: Path, watcher: Watcher, overrides: list[str]) -> str:
    """Go on with the run at *path* as if nothing had happened; return how it ended."""
    folder = RunFolder.open(path)
    config = load_config(ServeConfig, path / CONFIG, overrides, env={})
    checkpoint = folder.load_checkpoint()
    keys = load_key_pair(config.secret_key)
    model = ServerModel(config)
    with _gateway(config, keys) as gateway:
        run = Run(config, model, folder, gateway, watcher, checkpoint.state["run"])
        try:
            run.resume(checkpoint)
        except (KeyError, ValueError, RuntimeError) as error:
            raise StorageError(
                f"{path}: its checkpoint does not fit its config: {error}"
            ) from error
        return _finish(run)


@contextmanager
def removed_if_it_never_began(folder: RunFolder) -> Iterator[None]:
    """Leave no half-started run behind: without a checkpoint there is nothing to resume."""
    try:
        yield
    except BaseException:
        if not folder.checkpoints():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _gateway(config: ServeConfig, keys: Any) -> ZmqGateway:
    return ZmqGateway(
        GatewayConfig(
            address=config.listen,
            keys=keys,
            silent_after_s=min(30.0, config.patience_s),
        ),
        AllowList(config.allow_list),
    )


def _finish(run: Run) -> str:
    run.watcher.see(Listening(run.folder.path, run.gateway.address))
    coordinator = Coordinator(run)
    with stopping_on_signals(coordinator.stop):
        outcome = coordinator.serve()
    if outcome == COMPLETED:
        learned = run.ledger.global_factors()
        target = run.folder.path / ADAPTER
        difference = export_adapter(run.model.source, learned, run.ledger.head, target)
        run.watcher.see(Exported(ADAPTER, difference, target))
    else:
        run.watcher.see(RunPaused(run.folder.path))
    return outcome


def environment() -> dict[str, str]:
    """Return versions of what a result depends on, by package; "absent" where it is not here."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}
