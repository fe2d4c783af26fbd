"""What a device tells the coordinator about itself, so that its plan fits it.

Part of the protocol: travels inside Profiled. How the numbers are found is `measure.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MOST_BYTES = 2.0**50
# Operations and bytes a second, and seconds there and back, that no device and no link has.
MOST_PER_S = 1e18
MOST_SECONDS = 1e4
RECOMPUTE = ("none", "slice", "block", "own-block")
"""What a device computes again in the backward pass: nothing; all of its blocks at once; one block
after the other, so that never more than one block's activations are there; the same with gradient
graphs of the device's own making, which keep more of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a run may use on one device; None for what is unknown."""

    board: str | None = None
    """Name of the board, for people."""
    memory_bytes: float | None = None
    """Memory that the run may use, the whole process included: measured, or set by hand."""
    total_memory_bytes: float | None = None
    """Memory that the device has, or its container's limit."""
    overhead_bytes: float | None = None
    """Memory of the process once its libraries are loaded, before any part of the model."""
    flops_per_s: float | None = None
    """Floating-point operations a second in forward and backward of one real block."""
    up_bytes_per_s: float | None = None
    """Bandwidth from the device to the coordinator."""
    down_bytes_per_s: float | None = None
    """Bandwidth from the coordinator to the device."""
    round_trip_s: float | None = None
    """Time of a small message there and back."""
    power_mode: str | None = None
    """Name of the board's power mode, for people; another mode is another speed."""
    linear_bytes: float | None = None
    """Memory for each frozen weight of the blocks' linear layers; None: that of float32, 4."""
    base_bytes: float | None = None
    """Memory for each frozen parameter elsewhere: 2 or 4; None: 4."""
    compute_bytes: float | None = None
    """Memory for each activation of a matrix product: 2 or 4; None: 4."""
    recompute: str | None = None
    """What it computes again in the backward pass, one of `RECOMPUTE`; None: nothing."""
    native_bf16: bool | None = None
    """Whether the hardware itself multiplies bfloat16; emulation does not count."""


def problems(profile: DeviceProfile) -> list[str]:
    """Return what is wrong with a profile that a device has sent, a line each."""
    found = []
    for field in fields(profile):
        value = getattr(profile, field.name)
        if isinstance(value, str | bool) or value is None:
            continue
        is_least = value >= 0 if field.name in ("overhead_bytes", "round_trip_s") else value > 0
        if not math.isfinite(value) or not is_least:
            found.append(f"{field.name} is {value}")
        elif field.name.endswith("_bytes") and value > MOST_BYTES:
            found.append(f"{field.name} is {value:.0f}, more than any device has")
        elif field.name.endswith("_per_s") and value > MOST_PER_S:
            found.append(f"{field.name} is {value:g}, more than any device has")
        elif field.name == "round_trip_s" and value > MOST_SECONDS:
            found.append(f"round_trip_s is {value:g}, longer than any way there and back")
        elif field.name.endswith("_per_s") and value < 1:
            found.append(f"{field.name} is {value}, less than 1")
    for name in ("base_bytes", "compute_bytes"):
        if not found and getattr(profile, name) not in (None, 2, 4):
            found.append(f"{name} is {getattr(profile, name)}, not 2 or 4")
    if profile.recompute not in (None, *RECOMPUTE):
        found.append(f"recompute is {profile.recompute!r}, not one of {', '.join(RECOMPUTE)}")
    total, memory = profile.total_memory_bytes, profile.memory_bytes
    if not found and memory is not None and total is not None and memory > total:
        found.append(
            f"memory_bytes is {memory:.0f}, {memory / total:.1f} x the device's {total:.0f}"
        )
    return found
