"""Bytes of a session's messages by what they carry. Frames, acks and repetitions are not in it."""

from __future__ import annotations

import threading

from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    Gradient,
    Message,
    PartData,
    RoundStart,
    TopGradient,
    TopHidden,
)

# Hidden states travel both ways with `labels: device`, and so do gradients.
KINDS: dict[type, str] = {
    Activation: "activations_up",
    TopHidden: "activations_down",
    Gradient: "gradients_down",
    TopGradient: "gradients_up",
    AdapterUpload: "adapters_up",
    RoundStart: "round_starts_down",
    PartData: "parts_down",
}


class Traffic:
    """Counts; any thread may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, message: Message, num_bytes: int) -> None:
        """Count a message that goes up or down, as its kind says."""
        kind = KINDS.get(type(message))
        if kind is not None:
            with self._lock:
                self._counts[kind] = self._counts.get(kind, 0) + num_bytes

    def counts(self) -> dict[str, int]:
        """Return the bytes of each kind that there was."""
        with self._lock:
            return dict(self._counts)
