"""The machines that a simulation stands for: those of all devices, and the coordinator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from coordinator.config.planning import PlanningConfig
from coordinator.lab.simulation.boards import free_bytes, known, make_machine, make_profile
from coordinator.lab.simulation.clock import Machine
from coordinator.lab.simulation.config import FleetConfig, device_names
from edge_sdk.errors import ConfigError
from profiler.profile import DeviceProfile

T = TypeVar("T")


@dataclass(frozen=True)
class Fleet:
    """Who takes part, and how fast each is."""

    machines: dict[str, Machine]
    """Speeds of the devices by name, in order."""
    profiles: dict[str, DeviceProfile]
    """Profile that each device reports."""
    coordinator: Machine
    coordinator_bytes: float
    """Memory of the coordinator for the run, in bytes."""


def make_fleet(config: FleetConfig, planning: PlanningConfig) -> Fleet:
    """Look up every board and link.

    Raises:
        ConfigError: one of them has no entry.
    """
    there, scale = known(config.boards, config.links), config.scale
    machines, profiles = {}, {}
    for name, device in device_names(config).items():
        where = f"simulation.devices.{name}"
        board = _find(there.boards, device.board, f"{where}.board")
        link = _find(there.links, device.link, f"{where}.link")
        machines[name] = make_machine(
            board,
            link,
            utilisation=config.utilisation,
            scale=scale,
            flops_per_s=device.flops_per_s,
        )
        profiles[name] = make_profile(
            device.board,
            board,
            machines[name],
            overhead_bytes=config.overhead_bytes,
            scale=scale,
            memory_bytes=device.memory_bytes,
        )
        machines[name] = machines[name].slowed(device.slowdown)  # its profile says nothing of it
    board = _find(there.boards, config.coordinator, "simulation.coordinator")
    speed, memory = planning.server_flops_per_s, planning.server_memory_bytes
    return Fleet(
        machines,
        profiles,
        make_machine(
            board,
            utilisation=config.utilisation,
            scale=scale,
            flops_per_s=None if speed is None else speed * scale.flops,  # it is not scaled
        ),
        free_bytes(board, scale) if memory is None else memory,
    )


def _find(known: Mapping[str, T], name: str, where: str) -> T:
    if name not in known:
        raise ConfigError(f"{where}: {name!r} is unknown; there are {', '.join(sorted(known))}")
    return known[name]
