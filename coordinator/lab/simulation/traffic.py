"""What the bytes of a simulated run were: activations, gradients, adapters, or something else.

Counts what the modelled clock counts, so that all kinds together are its bytes. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    Gradient,
    Message,
    PlanAssigned,
    RoundStart,
    TopGradient,
    TopHidden,
)

ACTIVATIONS, GRADIENTS, ADAPTERS = "activations", "gradients", "adapters"
STARTS, BLOCKS, OTHER = "round starts", "blocks", "other"
UP_KINDS = (ACTIVATIONS, GRADIENTS, ADAPTERS, OTHER)
DOWN_KINDS = (ACTIVATIONS, GRADIENTS, STARTS, BLOCKS)

_KINDS: Mapping[type[Message], str] = {
    Activation: ACTIVATIONS,
    TopHidden: ACTIVATIONS,
    Gradient: GRADIENTS,
    TopGradient: GRADIENTS,
    AdapterUpload: ADAPTERS,
    RoundStart: STARTS,
    PlanAssigned: BLOCKS,
}

Traffic = dict[str, dict[str, int]]
"""Bytes by way, `up` or `down`, and by kind."""


class TrafficCounter:
    """Bytes of each device by way and kind since the last reading."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def count(self, device: str, way: str, message: Message, num_bytes: int) -> None:
        """Count a message that goes *way*."""
        self._counts[device, way, _KINDS.get(type(message), OTHER)] += num_bytes

    def read(self) -> dict[str, Traffic]:
        """Return the bytes by device, way and kind, and begin at 0 again."""
        found: dict[str, Traffic] = {}
        for (device, way, kind), num_bytes in sorted(self._counts.items()):
            found.setdefault(device, {}).setdefault(way, {})[kind] = num_bytes
        self._counts.clear()
        return found


def add_up(parts: list[Traffic]) -> Traffic:
    """Return the sum of *parts*, kind by kind."""
    total: Traffic = {}
    for part in parts:
        for way, kinds in part.items():
            into = total.setdefault(way, {})
            for kind, num_bytes in kinds.items():
                into[kind] = into.get(kind, 0) + num_bytes
    return total
