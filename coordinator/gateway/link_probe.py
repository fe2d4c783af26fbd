"""Answers devices that measure their link with `edge_sdk/client/link_speed.py`."""

from __future__ import annotations

import numpy as np

from coordinator.gateway.interface import Gateway
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import MAX_PROBE_BYTES, MAX_PROBES, Probe


class Probing:
    """Answers probes and counts them, so that nobody makes the coordinator send without end."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._left: dict[str, int] = {}
        self._data = np.zeros(MAX_PROBE_BYTES, np.uint8)

    def begin(self, device: str) -> None:
        """Grant *device* new probes: a session begins, or it has done its part of a round."""
        self._left[device] = MAX_PROBES

    def answer(self, device: str, envelope: Envelope) -> None:
        """Send as many bytes as *device* asks for.

        Raises:
            RemoteProtocolError: too many probes or bytes, or a device that never said Hello.
        """
        message: Probe = envelope.message
        if device not in self._left:
            raise RemoteProtocolError("Probe before Hello")
        if not 0 <= message.answer_bytes <= MAX_PROBE_BYTES:
            raise RemoteProtocolError(
                f"Probe.answer_bytes is {message.answer_bytes}, at most {MAX_PROBE_BYTES}"
            )
        if not self._left[device]:
            raise RemoteProtocolError(f"more than {MAX_PROBES} probes in a round")
        self._left[device] -= 1
        data = self._data[: message.answer_bytes]
        tensors = {"data": (data, "uint8")} if message.answer_bytes else {}
        self._gateway.send(device, Probe(stamp=message.stamp), tensors)
