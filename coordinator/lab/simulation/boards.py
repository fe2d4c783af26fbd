"""Boards and links as data; the speeds and the profile of a device that has them.

Knows facts (`data/boards.yaml`, `data/links.yaml`); how long anything takes is `clock.py`.
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
    """What a data sheet says of a computer."""

    memory_gib: float
    """Nominal memory in GiB."""
    system_gib: float = 0.0
    """What firmware and operating system keep of it, in GiB."""
    tflops: float
    """Dense peak in half precision, 1e12 operations a second."""
    watts: float
    """Power at the highest mode."""

    def __post_init__(self) -> None:
        _check_positive(self, at_least_zero=("system_gib",))
        if self.system_gib >= self.memory_gib:
            raise ValueError(f"system_gib {self.system_gib} leaves nothing of {self.memory_gib}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A link between a device and the coordinator."""

    down_mbit: float
    """Mbit/s to the device."""
    up_mbit: float
    """Mbit/s from the device."""
    rtt_ms: float
    """Time of a small message there and back, in milliseconds."""

    def __post_init__(self) -> None:
        _check_positive(self, at_least_zero=("rtt_ms",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """By how much the model that is meant is larger than the model that is trained.

    Every board and link becomes so much smaller instead, which gives the same ratios.
    """

    memory: float = 1.0
    """Bytes of one block there over bytes of one block here."""
    flops: float = 1.0
    """Operations for a token in one block there over those here."""
    bytes: float = 1.0
    """Hidden size there over hidden size here: what travels for a token."""

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Everything that has a name."""

    boards: dict[str, Board] = field(default_factory=dict)
    links: dict[str, Connection] = field(default_factory=dict)


@cache
def catalogue() -> Catalogue:
    """Return the boards and links that come with this package."""
    boards = load_config(Catalogue, DATA / "boards.yaml", env={}).boards
    return Catalogue(boards=boards, links=load_config(Catalogue, DATA / "links.yaml", env={}).links)


def known(boards: Mapping[str, Board], links: Mapping[str, Connection]) -> Catalogue:
    """Return the catalogue with *boards* and *links* of somebody's own, which come first."""
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
        scale: By how much the model that is meant is larger.
        flops_per_s: Speed of training, unscaled, where the board's own is not meant.
    """
    speed = board.tflops * 1e12 * utilisation if flops_per_s is None else flops_per_s
    machine = Machine(flops_per_s=speed / scale.flops, watts=board.watts)
    if link is None:
        return machine
    return replace(
        machine,
        up_bytes_per_s=link.up_mbit * 1e6 / BITS_PER_BYTE / scale.bytes,
        down_bytes_per_s=link.down_mbit * 1e6 / BITS_PER_BYTE / scale.bytes,
        round_trip_s=link.rtt_ms / 1e3,
    )


def free_bytes(board: Board, scale: Scale) -> float:
    """Return the memory that *board* has for a run."""
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
    """Return what a device would say of itself.

    Args:
        name: Name of the board, for people.
        board: Its data sheet.
        machine: Its speeds, scaled.
        overhead_bytes: What the process takes before any part of the model, unscaled.
        scale: By how much the model that is meant is larger.
        memory_bytes: Memory for the run, unscaled, where the board's own is not meant.
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
