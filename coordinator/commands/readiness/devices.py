"""Which devices, links and coordinator a forecast is for: measured profiles, or names of boards."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import is_device_name
from coordinator.lab.simulation.boards import (
    Connection,
    Scale,
    catalogue,
    make_machine,
    make_profile,
)
from coordinator.lab.simulation.config import FleetConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from profiler.profile import DeviceProfile

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a forecast takes for given."""

    devices: dict[str, DeviceProfile] = field(default_factory=dict)
    """Profile of each device by name; empty where nobody named one."""
    server: DeviceProfile | None = None
    """Profile of the coordinator's machine; None for this one, whose speed is not known."""

    def settings(self, config: ServeConfig) -> ServeConfig:
        """Return *config* with the coordinator's speed and memory where it gives none itself."""
        if self.server is None:
            return config
        planning = config.planning
        return replace(
            config,
            planning=replace(
                planning,
                server_flops_per_s=planning.server_flops_per_s or self.server.flops_per_s,
                server_memory_bytes=planning.server_memory_bytes or self.server.memory_bytes,
            ),
        )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who would take part, and over which links."""
    add = parser.add_argument
    add(
        "--profiles",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="one JSON file per device, <name>.json, as `profiler measure --write` makes it",
    )
    add(
        "--board",
        nargs="+",
        default=[],
        metavar="[NAME:]BOARD",
        help="devices by the data sheets of their boards, such as kitchen:orin-nano-8gb",
    )
    add(
        "--link",
        nargs="+",
        default=[],
        metavar="[NAME:]LINK",
        help="links, such as wifi-good, for all whose profile has none, or for the device NAME",
    )
    add(
        "--coordinator",
        metavar="FILE|BOARD",
        help="profile or board of the coordinator; else its speed is not known before it serves",
    )


def read_devices(options: argparse.Namespace) -> Assumed:
    """Return what the options say.

    Raises:
        ConfigError: a file cannot be used, a board or link is not known, a device is given twice.
    """
    devices = read_profiles(options.profiles)
    for name, board in _named(options.board, "--board"):
        device = name or board
        if device in devices:
            raise ConfigError(
                f"--board: a second device named {device!r}; give it a name: NAME:{board}"
            )
        if not is_device_name(device):
            raise ConfigError(f"--board: {device!r} is no name: letters, digits, . _ - only")
        devices[device] = _profile(board, "--board")
    for name, link in _named(options.link, "--link"):
        if name and name not in devices:
            raise ConfigError(f"--link: no device is named {name!r}; {_there_are(devices)}")
        way = _found(catalogue().links, link, "--link")
        for device, profile in devices.items():
            if device == name or (not name and profile.up_bytes_per_s is None):
                devices[device] = _linked(profile, way)
    return Assumed(devices=devices, server=_server(options.coordinator))


def read_profiles(paths: Sequence[Path]) -> dict[str, DeviceProfile]:
    """Return the profile in each file, by the name of the device, which is that of the file.

    Raises:
        ConfigError: a file cannot be used, or a device has two.
    """
    found: dict[str, DeviceProfile] = {}
    for path in paths:
        if path.stem in found:
            raise ConfigError(f"{path}: a second profile for device {path.stem!r}; rename the file")
        found[path.stem] = load_config(DeviceProfile, path, env={})
    return found


def _server(given: str | None) -> DeviceProfile | None:
    if given is None:
        return None
    if given in catalogue().boards:
        return _profile(given, "--coordinator")
    path = Path(given)
    if not path.exists():
        raise ConfigError(
            f"--coordinator: {given!r} is neither a file nor a board; "
            f"{_there_are(catalogue().boards)}"
        )
    return load_config(DeviceProfile, path, env={})


def _named(given: Iterable[str], option: str) -> list[tuple[str, str]]:
    """Return (name, value) of each NAME:VALUE, the ones with a name last; without one it is ''."""
    pairs = []
    for text in given:
        name, has_name, value = text.rpartition(":")
        if not value or (has_name and not name):
            raise ConfigError(f"{option}: {text!r} is no [NAME:]VALUE")
        pairs.append((name, value))
    return sorted(pairs, key=lambda pair: bool(pair[0]))


def _profile(name: str, option: str) -> DeviceProfile:
    board = _found(catalogue().boards, name, option)
    fleet, scale = FleetConfig(), Scale()
    machine = make_machine(board, utilisation=fleet.utilisation, scale=scale)
    profile = make_profile(name, board, machine, overhead_bytes=fleet.overhead_bytes, scale=scale)
    return replace(profile, up_bytes_per_s=None, down_bytes_per_s=None, round_trip_s=None)


def _linked(profile: DeviceProfile, link: Connection) -> DeviceProfile:
    return replace(
        profile,
        up_bytes_per_s=link.up_bytes_per_s,
        down_bytes_per_s=link.down_bytes_per_s,
        round_trip_s=link.round_trip_s,
    )


def _found(known: Mapping[str, T], name: str, option: str) -> T:
    if name not in known:
        raise ConfigError(f"{option}: {name!r} is unknown; {_there_are(known)}")
    return known[name]


def _there_are(names: Iterable[str]) -> str:
    return f"there are {', '.join(sorted(names))}"
