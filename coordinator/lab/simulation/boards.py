"""Boards and links as data; the speeds and the profile of a device that has them.

Knows facts (`boards.yaml`, `links.yaml`); `clock.py` says how long anything takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from coordinator.lab.simulation.clock import Machine
from edge_sdk.config.loader import load_config
from profiler.profile import DeviceProfile

DATA = Path(__file__).parent
GIB = 1024**3
BITS_PER_BYTE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The data sheet of a computer."""

    memory_gib: float
    """Nominal memory in GiB."""
    system_gib: float = 0.0
    """Memory that firmware and operating system take, in GiB."""
    tflops: float
    """Dense peak in half precision, 1e12 operations a second."""
    watts: float
    """Power at the highest mode, in watts."""

    def __post_init__(self) -> None:
        _check_positive(self, at_least_zero=("system_gib",))
        if self.system_gib >= self.memory_gib:
            raise ValueError(f"system_gib {self.system_gib} leaves nothing of {self.memory_gib}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A link between a device and the coordinator."""

    down_mbit: float
    """Rate to the device, in Mbit/s."""
    up_mbit: float
    """Rate from the device, in Mbit/s."""
    rtt_ms: float
    """Time of a small message there and back, in milliseconds."""

    def __post_init__(self) -> None:
        _check_positive(self, at_least_zero=("rtt_ms",))

    @property
    def up_bytes_per_s(self) -> float:
        """Rate from the device, in bytes a second."""
        return self.up_mbit * 1e6 / BITS_PER_BYTE

    @property
    def down_bytes_per_s(self) -> float:
        """Rate to the device, in bytes a second."""
        return self.down_mbit * 1e6 / BITS_PER_BYTE

    @property
    def round_trip_s(self) -> float:
        """Time of a small message there and back, in seconds."""
        return self.rtt_ms / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Ratios between the model that a simulation stands for and the smaller one that is trained.

    Every board and link becomes smaller by them instead, which gives the same ratios.
    """

    memory: float = 1.0
    """Bytes of one block there over bytes of one block here."""
    flops: float = 1.0
    """Operations for a token in one block there over those here."""
    bytes: float = 1.0
    """Hidden size there over hidden size here, as hidden states travel."""

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Boards and links by name."""

    boards: dict[str, Board] = field(default_factory=dict)
    links: dict[str, Connection] = field(default_factory=dict)


@cache
def catalogue() -> Catalogue:
    """Return the boards and links that come with this package."""
    boards = load_config(Catalogue, DATA / "boards.yaml", env={}).boards
    return Catalogue(boards=boards, links=load_config(Catalogue, DATA / "links.yaml", env={}).links)


def known(boards: Mapping[str, Board], links: Mapping[str, Connection]) -> Catalogue:
    """Return the catalogue with further *boards* and *links*, which come first."""
    ours = catalogue()
    return Catalogue(boards={**ours.boards, **boards}, links={**ours.links, **links})


def make_machine(
    board: Board,
    link: Connection | None = None,
    *,
    utilisation: float,
    scale: Scale,
    flops_per_s: float | None = None,
) -> Machine:
    """Return the speeds of *board* behind *link*; without one, of the coordinator.

    Args:
        board: Its data sheet.
        link: Its connection.
        utilisation: Share of the peak that training reaches.
        scale: Ratios between the model that is meant and the one that is trained.
        flops_per_s: Speed of training, unscaled, instead of the board's own.
    """
    speed = board.tflops * 1e12 * utilisation if flops_per_s is None else flops_per_s
    machine = Machine(flops_per_s=speed / scale.flops, watts=board.watts)
    if link is None:
        return machine
    return replace(
        machine,
        up_bytes_per_s=link.up_bytes_per_s / scale.bytes,
        down_bytes_per_s=link.down_bytes_per_s / scale.bytes,
        round_trip_s=link.round_trip_s,
    )


def free_bytes(board: Board, scale: Scale) -> float:
    """Return the memory that *board* has for a run, in bytes."""
    return (board.memory_gib - board.system_gib) * GIB / scale.memory


def make_profile(
    name: str,
    board: Board,
    machine: Machine,
    *,
    overhead_bytes: float,
    scale: Scale,
    memory_bytes: float | None = None,
) -> DeviceProfile:
    """Return the profile that a device would report.

    Args:
        name: Name of the board, for people.
        board: Its data sheet.
        machine: Its speeds, scaled.
        overhead_bytes: Memory of the process without any part of the model, unscaled.
        scale: Ratios between the model that is meant and the one that is trained.
        memory_bytes: Memory for the run, unscaled, instead of the board's own.
    """
    memory = free_bytes(board, scale) if memory_bytes is None else memory_bytes / scale.memory
    return DeviceProfile(
        board=name,
        memory_bytes=memory,
        total_memory_bytes=max(memory, board.memory_gib * GIB / scale.memory),
        overhead_bytes=overhead_bytes / scale.memory,
        flops_per_s=machine.flops_per_s,
        up_bytes_per_s=machine.up_bytes_per_s,
        down_bytes_per_s=machine.down_bytes_per_s,
        round_trip_s=machine.round_trip_s,
    )


def _check_positive(facts: Board | Connection | Scale, at_least_zero: tuple[str, ...] = ()) -> None:
    for each in fields(facts):
        value = getattr(facts, each.name)
        if not (value > 0 or (value == 0 and each.name in at_least_zero)):
            raise ValueError(f"{each.name} must be above 0, got {value}")
