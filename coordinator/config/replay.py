"""The `replay` section of a run's configuration: hidden states that are computed and sent once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """What the coordinator keeps of devices whose blocks are frozen (`r: 0`); see docs/method.md.

    While nothing changes in a device's blocks, a sample's hidden state stays what it is: the device
    sends it once, and later epochs take it from a file in the run's folder, which goes when the run
    ends or the blocks change.
    """

    when: Literal["never", "auto", "always"] = "never"
    """`auto`: for devices with `r: 0`, where the labels are on the coordinator anyway; `always`:
    with `labels: device` too, of whose text the coordinator then keeps more than it must. Without
    effect where rounds have no barrier."""
    max_bytes: float = 8 * 2.0**30
    """Most bytes of all devices' files together; what has no room is sent again in each epoch."""
    dtype: Literal["wire", "float16", "int8"] = "wire"
    """`wire`: as it came, so that nothing changes in what is learned; the others keep less, and
    later epochs see what they lose."""

    def __post_init__(self) -> None:
        if not self.max_bytes >= 0:
            raise ValueError(f"max_bytes must be at least 0, got {self.max_bytes}")

    def applies(self, labels: str) -> bool:
        """Return whether states of frozen blocks are kept in a run whose labels are there."""
        return self.when == "always" or (self.when == "auto" and labels == "server")
