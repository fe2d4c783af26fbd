"""What both sides of the protocol send, and the stamp on every message; see `messages.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a message belongs to, so that it may be sent twice and is applied once."""

    run: str = ""
    """Run id; empty before the coordinator has welcomed the device."""
    device: str = ""
    """Name of the device as the coordinator registered its key."""
    round: int = 0
    """Aggregation round, from 0."""
    step: int = 0
    """Optimizer step since the start of the run, from 0."""
    attempt: int = 0
    """Counts how often the coordinator started this round; answers to an earlier one are stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The sender could not do what was asked, or was sent something it cannot accept."""

    stamp: Stamp
    error: str
    """Class name from `errors.py`."""
    text: str
    is_fatal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Bytes by which a device measures its link; the answer brings as many as were asked for.

    Tensors: `data`, uint8, meaning nothing; absent where there are none.
    """

    stamp: Stamp
    answer_bytes: int = 0
    """Size of `data` in the coordinator's answer; 0 in the answer itself."""


# What a Probe may bring and ask for: what a device may send before it has a plan.
MAX_PROBE_BYTES = 1024 * 1024
# In one session. A device needs about half of them to measure once.
MAX_PROBES = 48
