"""Choose split points: each device takes as many blocks as its memory and the wave's time allow.

Water-filling. In a wave of T seconds a device takes the deepest split that fits its memory and
keeps its own compute and link time within T; what it leaves is the coordinator's, whose time is the
sum over the devices, or the share of it that is in a round. The plan is the smallest T at which
both sides keep it. Deeper splits never cost the coordinator more, so that no choice of splits has a
smaller T.

Pure: tables in, a choice out. It knows no model, no profile and no estimate.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edge_sdk.errors import ConfigError

Binding = Literal["fixed", "all blocks", "memory", "time"]
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Option:
    """What one split point of one device costs."""

    split: int
    device_bytes: float
    """Peak bytes of the device's whole process."""
    device_s: float | None
    """Compute and link seconds of the device in a wave; None where its speed is unknown: then only
    memory decides."""
    server_bytes: float
    """Bytes that this device's rows take on the coordinator; never more at a deeper split."""
    server_s: float
    """Seconds that they take there in a wave; never more at a deeper split."""


@dataclass(frozen=True, slots=True)
class Server:
    """The coordinator as splits see it."""

    budget_bytes: float
    """Bytes that the run may use; infinite where unknown."""
    base_bytes: Sequence[float]
    """Bytes before any device's rows come, by the first block that it holds, 0 .. L; never more
    where it holds less."""
    most_devices: int | None = None
    """Devices of a round, where not all are in each."""

    def bytes_of(self, rows: Sequence[float]) -> float:
        """Return the most that rows of the devices of a round take together."""
        if self.most_devices is None or self.most_devices >= len(rows):
            return math.fsum(rows)
        return math.fsum(heapq.nlargest(self.most_devices, rows))

    def seconds_of(self, rows: Sequence[float]) -> float:
        """Return what rows of the devices of a round take it one after the other, in the mean."""
        share = min(1.0, (self.most_devices or len(rows)) / max(1, len(rows)))
        return share * math.fsum(rows)


@dataclass(frozen=True, slots=True)
class Splits:
    """A choice for every device, and what it comes to."""

    chosen: dict[str, Option]
    wave_s: float
    """Seconds of a wave on the slower side."""
    server_s: float
    server_bytes: float
    binding: dict[str, Binding]
    """What keeps a device from going deeper."""


def fitting(
    device: str, options: Sequence[Option], budget_bytes: float, pin: int | None = None
) -> list[Option]:
    """Return the options within a device's memory, the shallowest first; only *pin* if given.

    Raises:
        ConfigError: there is none.
    """
    ordered = sorted(options, key=lambda option: option.split)
    first, last = ordered[0], ordered[-1]
    if pin is not None and not any(option.split == pin for option in ordered):
        raise ConfigError(
            f"devices.{device}.split: {pin} is outside {first.split}..{last.split} "
            "(the model's blocks)"
        )
    allowed = [option for option in ordered if pin in (None, option.split)]
    fits = [option for option in allowed if option.device_bytes <= budget_bytes]
    if fits:
        return fits
    least = min(allowed, key=lambda option: option.device_bytes)
    where = f"devices.{device}.split: {pin}" if pin else f"device {device!r}: split {least.split}"
    raise ConfigError(
        f"{where} needs {_mib(least.device_bytes)}, its budget is {_mib(budget_bytes)}; "
        "lower micro_batch or max_length, or give the run more of the device's memory"
    )


def choose_splits(
    options: Mapping[str, Sequence[Option]],
    budgets: Mapping[str, float],
    server: Server,
    pins: Mapping[str, int] | None = None,
) -> Splits:
    """Return the splits of the shortest wave.

    Args:
        options: Each device's table, in any order.
        budgets: Each device's memory in bytes; infinite where nobody knows.
        server: The coordinator.
        pins: Splits that cannot be chosen.

    Raises:
        ConfigError: a device fits no split, or the coordinator does not fit the rest.
    """
    table = _fitting(options, budgets, pins or {})
    # Between two neighbouring device times the choice does not change: bisection over these times
    # instead of over real numbers ends at the exact optimum.
    slowest = max((min(map(_seconds, own)) for own in table.values()), default=0.0)
    times = sorted({slowest} | {_seconds(o) for own in table.values() for o in own})
    times = times[bisect_left(times, slowest) :]
    index = bisect_left(times, True, key=lambda time_s: _holds(table, server, time_s))
    # One time earlier the coordinator was the slower side, but perhaps by less than the step.
    near = [times[i] for i in (index, index - 1) if 0 <= i < len(times)]
    able = [t for t in near if server_bytes(server, _at(table, t)) <= server.budget_bytes]
    if not able:
        raise _server_too_small(server, _at(table, times[-1]))
    best_s = min(able, key=lambda t: max(t, _server_s(server, _at(table, t))))
    return _splits(options, budgets, server, pins or {}, _at(table, best_s))


def deepest_splits(
    options: Mapping[str, Sequence[Option]],
    budgets: Mapping[str, float],
    server: Server,
    pins: Mapping[str, int] | None = None,
) -> Splits:
    """Return the deepest splits that fit the devices' memory, whatever the time; see above."""
    chosen = _at(_fitting(options, budgets, pins or {}), math.inf)
    if server_bytes(server, chosen) > server.budget_bytes:
        raise _server_too_small(server, chosen)
    return _splits(options, budgets, server, pins or {}, chosen)


class SplitRule(NamedTuple):
    """One way to choose split points."""

    choose: Callable[
        [Mapping[str, Sequence[Option]], Mapping[str, float], Server, Mapping[str, int]], Splits
    ]
    """(options, budgets, server, pins) -> a split for every device, as `choose_splits`."""
    weighs_time: bool = False
    """Whether it needs speeds; where the coordinator's is unknown, `memory` decides instead."""


SPLIT_RULES = {
    "fixed": SplitRule(deepest_splits),  # all splits are pinned
    "memory": SplitRule(deepest_splits),
    "armsc": SplitRule(choose_splits, weighs_time=True),
}
"""The choices of `planning.split`."""


def server_bytes(server: Server, chosen: Mapping[str, Option]) -> float:
    """Return the coordinator's bytes: blocks from the shallowest split on, everybody's rows."""
    num_blocks = len(server.base_bytes) - 1
    first = min((option.split for option in chosen.values()), default=num_blocks)
    return server.base_bytes[first] + server.bytes_of([o.server_bytes for o in chosen.values()])


def _fitting(
    options: Mapping[str, Sequence[Option]], budgets: Mapping[str, float], pins: Mapping[str, int]
) -> dict[str, list[Option]]:
    return {
        name: fitting(name, own, budgets[name], pins.get(name)) for name, own in options.items()
    }


def _seconds(option: Option) -> float:
    return 0.0 if option.device_s is None else option.device_s


def _at(table: Mapping[str, Sequence[Option]], time_s: float) -> dict[str, Option]:
    """Return the deepest option of every device that keeps within *time_s*."""
    return {
        name: [option for option in own if _seconds(option) <= time_s][-1]
        for name, own in table.items()
    }


def _holds(table: Mapping[str, Sequence[Option]], server: Server, time_s: float) -> bool:
    chosen = _at(table, time_s)
    has_room = server_bytes(server, chosen) <= server.budget_bytes
    return has_room and _server_s(server, chosen) <= time_s


def _server_s(server: Server, chosen: Mapping[str, Option]) -> float:
    # fsum: the same sum whatever the order of the devices, and never less for longer times
    return server.seconds_of([option.server_s for option in chosen.values()])


def _splits(
    options: Mapping[str, Sequence[Option]],
    budgets: Mapping[str, float],
    server: Server,
    pins: Mapping[str, int],
    chosen: dict[str, Option],
) -> Splits:
    server_s = _server_s(server, chosen)
    return Splits(
        chosen,
        max([server_s, *map(_seconds, chosen.values())]),
        server_s,
        server_bytes(server, chosen),
        {n: _binding(options[n], o, budgets[n], n in pins) for n, o in chosen.items()},
    )


def _binding(
    options: Sequence[Option], chosen: Option, budget_bytes: float, is_pinned: bool
) -> Binding:
    if is_pinned:
        return "fixed"
    deeper = [option for option in options if option.split > chosen.split]
    if not deeper:
        return "all blocks"
    fits = any(option.device_bytes <= budget_bytes for option in deeper)
    return "time" if fits else "memory"


def _server_too_small(server: Server, chosen: Mapping[str, Option]) -> ConfigError:
    needed, last = server_bytes(server, chosen), len(server.base_bytes) - 1
    first = min((option.split for option in chosen.values()), default=last)
    if first == last:
        return ConfigError(
            f"the coordinator needs {_mib(needed)} to evaluate the whole model, its budget is "
            f"{_mib(server.budget_bytes)}; raise planning.server_memory_bytes, or remove "
            "evaluation.data.path"
        )
    return ConfigError(
        f"the coordinator needs {_mib(needed)} for blocks {first}..{last - 1} "
        f"and {len(chosen)} devices at their deepest splits, its budget is "
        f"{_mib(server.budget_bytes)}; raise planning.server_memory_bytes, lower micro_batch or "
        "max_length, or leave out a device"
    )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"
