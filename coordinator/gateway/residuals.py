"""What the coordinator holds of the devices' samples, so that they need to send changes only.

Each device has a store of its own, of which it fills as much as the config allows and no more. What
is written there stands in `edge_sdk/protocol/residual.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.held_states import HeldStates
from edge_sdk.names import inside
from edge_sdk.protocol import residual
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation


class Residuals:
    """Hidden states by device and sample."""

    def __init__(self, limit_bytes: int, folder: Path | None) -> None:
        """Hold at most *limit_bytes* of each device.

        Args:
            limit_bytes: Most bytes of a device's samples.
            folder: Where they are kept for a coordinator that resumes the run; None: nowhere.
        """
        self.limit_bytes = limit_bytes
        self._folder = folder
        self._held: dict[str, HeldStates] = {}
        self._round: int | None = None

    def of(self, device: str) -> HeldStates:
        """Return what is held of a device.

        Raises:
            StorageError: the folder cannot be written.
        """
        if device not in self._held:
            path = None if self._folder is None else inside(self._folder, f"{device}.log")
            self._held[device] = HeldStates(self.limit_bytes, path)
            if self._round is not None:
                self._held[device].begin_round(self._round)
        return self._held[device]

    def commit(self, step: int, *, goes_on: bool = False) -> Callable[[], None]:
        """Make what was held before *step* that to which a round that is begun again goes back.

        Args:
            step: Where the run stands.
            goes_on: Whether what has come of that step already stays held, as it goes on.

        Returns:
            What writes that for a coordinator that resumes the run; any thread may call it, before
            the next commit. It raises StorageError where the folder cannot be written.
        """
        writes = [held.commit_in_memory(step, goes_on=goes_on) for held in self._held.values()]

        def write() -> None:
            for each in writes:
                each()

        return write

    def begin_round(self, number: int) -> None:
        """Go on to round *number*, or back to the last commit where it has been begun before."""
        self._round = number
        for held in self._held.values():
            held.begin_round(number)

    def read(self, device: str, envelope: Envelope, codec: str) -> Envelope | None:
        """Return an Activation whose hidden states are whole; None where it has to be sent again.

        Args:
            device: Who sent it.
            envelope: The Activation and its tensors.
            codec: How the device was told to send.

        Raises:
            RemoteProtocolError: it is not what the codec says.
        """
        message: Activation = envelope.message
        if not message.starts:
            return envelope
        if codec != residual.RESIDUAL:
            raise RemoteProtocolError(f"Activation with `starts`, but the codec is {codec}")
        tensors, held = envelope.tensors, self.of(device)
        if message.replays or len(tensors.get("hidden", ())) != len(tensors["lengths"]):
            raise RemoteProtocolError("Activation with `starts`, but not of all its sequences")
        held.begin_step(message.stamp.step)
        hidden_BTD = residual.read(tensors, message.samples, message.starts, held)
        if hidden_BTD is None:
            return None
        whole = {name: value for name, value in tensors.items() if name != "rest"}
        return replace(
            envelope,
            message=replace(message, samples=(), starts=()),
            tensors=whole | {"hidden": hidden_BTD},
        )
