"""float16 on the wire as far as its range goes: a tensor that does not fit travels in bfloat16.

The header of a message names the codec of each tensor, so that whoever sends chooses, one tensor at
a time, and whoever reads needs no warning. Both take two bytes a number.
"""

from __future__ import annotations

import logging

import numpy as np

from edge_sdk.protocol.codecs import Array

log = logging.getLogger(__name__)

# From here on float16 rounds to infinity.
OVERFLOWS = 65520.0
# Below this float16 has fewer bits, down to none at 2^-25.
FADES = 2.0**-14


class RoomyCodec:
    """Chooses the codec of tensors that are to travel as the run says, and says where it cannot."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def choose(self, name: str, array: Array, what: str) -> str:
        """Return *name*, or bfloat16 where that is float16 and *array* does not fit.

        Args:
            name: The run's codec.
            array: What is to be sent, finite.
            what: What it is, for the log.
        """
        if name != "float16" or not array.size:
            return name
        largest = max(float(np.max(array)), -float(np.min(array)))
        if largest >= OVERFLOWS:
            self._say("overflow", what, largest, "such tensors travel in bfloat16")
            return "bfloat16"
        if 0.0 < largest < FADES:
            self._say("underflow", what, largest, "it loses bits; set codec to bfloat16")
        return name

    def _say(self, event: str, what: str, largest: float, effect: str) -> None:
        """Log it, once for each kind of tensor."""
        if f"{event} {what}" not in self._said:
            self._said.add(f"{event} {what}")
            log.warning("float16.%s what=%s largest=%.4g effect=%s", event, what, largest, effect)
