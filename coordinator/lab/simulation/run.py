"""Many devices in one process, trained for real, with a modelled clock.

    result = simulate(config, Watchers())

The coordinator and the participants are those of a deployment. There is no network (`gateway.py`),
time is modelled (`clock.py`), and nothing happens at the same moment. Equal configs on one machine
give equal metrics and equal times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.engine.local import make_local
from coordinator.engine.server_model import ServerModel
from coordinator.export.outcome import write_result
from coordinator.lab.simulation.clock import Costs
from coordinator.lab.simulation.config import SimulationConfig, device_names
from coordinator.lab.simulation.data import deal, own_data
from coordinator.lab.simulation.device import SharedCompute, SimulatedDevice
from coordinator.lab.simulation.fleet import Fleet, make_fleet
from coordinator.lab.simulation.gateway import SimulatedGateway
from coordinator.lab.simulation.result import SimulationResult, read_result
from coordinator.lab.simulation.timing import (
    ClockListener,
    ClockWatcher,
    Jitter,
    TimedEngine,
)
from coordinator.report.at_end import report_at_end
from coordinator.results.events.event import Watcher
from coordinator.results.events.run import Exported, FolderKnown
from coordinator.results.lifecycle import ADAPTER, COMPLETED, STOPPED, new_folder
from coordinator.results.run_folder import SIMULATION
from coordinator.results.watchers import Watchers
from coordinator.rounds.loop import Coordinator
from coordinator.steering.listener import Listener
from coordinator.steering.wishes import Wish
from coordinator.tracking.reporting import reporting
from coordinator.tracking.trackers import require_trackers
from edge_sdk.client.config import ClientConfig
from edge_sdk.command import stopping_on_signals
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError
from edge_sdk.model.kept.part_cache import PartCache
from profiler.profile import DeviceProfile

# Fixed, as it is in every message: times must not depend on the name of a folder.
RUN_ID = "simulation"


@dataclass(frozen=True, slots=True)
class SimulationStarted(FolderKnown):
    """The devices of a simulation are made."""

    num_devices: int

    @property
    def text(self) -> str:
        """The run's folder and the size of its fleet."""
        return f"run {self.folder}: {self.num_devices} simulated devices"


def simulate(config: SimulationConfig, watcher: Watcher) -> SimulationResult:
    """Simulate a run to its end; Ctrl-C ends it early, with what there is so far.

    Raises:
        EdgeError: the config, the data or the model is wrong, or a device has failed.
    """
    _check(config)
    fleet = make_fleet(config.simulation, config.planning)
    serve_config = _served(config, fleet)
    shards = deal(config.simulation, device_names(config.simulation), config.training.seed)
    jitter = Jitter(config.simulation.jitter, config.training.seed)
    listener = ClockListener(fleet.machines, fleet.coordinator, jitter)
    listener.has_barriers = config.round_mode == "synchronous"
    timed = partial(TimedEngine, listener)
    cache = PartCache(config.simulation.cache)
    model = ServerModel(serve_config, cache, partial(make_local, kind=timed))
    listener.costs = Costs(model.shape, model.facts.layout.num_blocks)
    with (
        new_folder(serve_config) as folder,
        tempfile.TemporaryDirectory(prefix="edgesplit-") as state,
        SharedCompute(listener) as shared,
    ):
        folder.write_text(SIMULATION, dump_config(config))
        own = {n: _client_config(config, n, p, Path(state)) for n, p in fleet.profiles.items()}
        devices = {n: SimulatedDevice(n, c, shards.get(n), shared) for n, c in own.items()}
        leaving = _leave(config, devices)
        is_timed = serve_config.waves == "available" or not listener.has_barriers
        clock = ClockWatcher(folder, listener)
        with (
            SimulatedGateway(devices, listener, is_timed=is_timed) as gateway,
            reporting(serve_config, folder, Watchers([clock, watcher])) as told,
            report_at_end(serve_config, folder, told) as seen_by,
        ):
            coordinator = Coordinator(
                serve_config,
                model,
                folder,
                gateway,
                seen_by,
                RUN_ID,
                pool=shared,
                least_devices=1 if leaving else None,
                clock=float,  # always 0: in modelled time nobody waits for a slow machine
            )
            coordinator.watcher.see(SimulationStarted(folder.path, len(devices)))
            return read_result(_serve(coordinator), folder, clock.plans)


def _check(config: SimulationConfig) -> None:
    """Refuse what cannot be simulated or reported, and set torch up."""
    if config.trained_by != "devices":
        raise ConfigError("trained_by: a simulation trains on devices, got 'coordinator'")
    require_trackers(config)
    if config.simulation.threads is not None:
        import torch

        torch.set_num_threads(config.simulation.threads)


def _leave(config: SimulationConfig, devices: Mapping[str, SimulatedDevice]) -> list[str]:
    """Tell the devices that are to leave when; return their names."""
    for name, own in device_names(config.simulation).items():
        devices[name].leaves_after_step = own.leaves_after_step
    return [name for name, device in devices.items() if device.leaves_after_step is not None]


def _serve(coordinator: Coordinator) -> str:
    def ask(wish: Wish) -> str | None:
        if wish.kind == "pause":
            return "a simulation cannot go on later; `coordinator stop` keeps what it has so far"
        coordinator.ask(wish)
        return None

    folder = coordinator.folder
    with Listener(folder.path, ask) as listener:
        with stopping_on_signals(coordinator.stop):
            outcome = coordinator.serve()
        if outcome in (COMPLETED, STOPPED):
            about = coordinator.config, coordinator.model, coordinator.learned.ledger
            difference = write_result(folder, *about, coordinator.watcher)
            if difference is not None:
                coordinator.watcher.see(Exported(ADAPTER, difference))
        else:
            coordinator.run.reporting.flush()
        listener.answer(outcome)
    return outcome


def _served(config: SimulationConfig, fleet: Fleet) -> ServeConfig:
    """Return the coordinator's configuration; its planning knows the machine that is simulated."""
    planning = replace(
        config.planning,
        server_memory_bytes=fleet.coordinator_bytes,
        server_flops_per_s=fleet.coordinator.flops_per_s,
    )
    return replace(config.serve_config(), planning=planning)


def _client_config(
    config: SimulationConfig, name: str, profile: DeviceProfile, state: Path
) -> ClientConfig:
    fleet = config.simulation
    return ClientConfig(
        coordinator="tcp://nobody:0",
        server_key="",
        data=own_data(fleet, device_names(fleet)[name]),
        device=config.device,
        compute=config.compute,
        cache=fleet.cache,
        state=state,
        profile=profile,
    )
