"""What this device offers a run: set by hand where the config says so, else measured."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path

from edge_sdk.client.backends import choose_backend
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.incoming import Inbox
from edge_sdk.client.link_speed import probe
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import Stamp
from edge_sdk.transport.link import Link
from profiler.profile import DeviceProfile

log = logging.getLogger(__name__)


def device_profile(config: ClientConfig, model: Path, max_length: int) -> DeviceProfile:
    """Return the profile of this device, before any part of the model is loaded; without its link.

    Args:
        config: The device's own config; what its `profile` sets is not measured.
        model: Folder with the model's config: one block of it is run with random weights.
        max_length: Longest sequence of the run.

    Raises:
        ConfigError: the budget set by hand is more than the device has.
    """
    backend = choose_backend(config)
    by_hand = overlaid(backend.memory_model(config), config.profile)
    if None not in (by_hand.memory_bytes, by_hand.overhead_bytes, by_hand.flops_per_s):
        return by_hand
    device, speed = "cpu", by_hand.flops_per_s
    if (place := backend.speed_on(config)) is not None:
        device, compute = place
        speed = speed or block_speed(model, device, compute, max_length)
    elif speed is None:
        log.info("speed.unknown reason=%s", "without torch, the first round will show it")
    return _measured(by_hand, device, speed)


def device_memory(config: ClientConfig) -> DeviceProfile:
    """Return the memory of this device, and how it computes; its speed is not measured.

    Raises:
        ConfigError: the budget set by hand is more than the device has.
    """
    backend = choose_backend(config)
    by_hand = overlaid(backend.memory_model(config), config.profile)
    if None not in (by_hand.memory_bytes, by_hand.overhead_bytes):
        return by_hand
    place = backend.speed_on(config)
    return _measured(by_hand, "cpu" if place is None else place[0], by_hand.flops_per_s)


def _measured(by_hand: DeviceProfile, device: str, speed: float | None) -> DeviceProfile:
    """Return what is measured of memory and board, and *by_hand* over it."""
    from profiler.measure import measure_profile

    try:
        measured = measure_profile(
            device=device,
            memory_bytes=by_hand.memory_bytes,
            overhead_bytes=by_hand.overhead_bytes,
            flops_per_s=speed,
        )
    except ValueError as error:
        raise ConfigError(f"profile.memory_bytes: {error}") from error
    return overlaid(measured, by_hand)


def overlaid(measured: DeviceProfile, by_hand: DeviceProfile) -> DeviceProfile:
    """Return *measured* with every field that was set by hand as it was set."""
    own = {f.name: getattr(by_hand, f.name) for f in fields(by_hand)}
    return replace(measured, **{name: value for name, value in own.items() if value is not None})


def block_speed(model: Path, device: str, compute: str, max_length: int) -> float | None:
    """Return the operations a second of a block of *model*; None if it cannot be measured.

    Forward and backward of one block with random weights.

    Args:
        model: Folder with the model's config.
        device: As torch calls it.
        compute: Dtype of weights and activations.
        max_length: Longest sequence of the run.
    """
    from profiler.measure import measure_block

    try:
        measured = measure_block(model, length=min(128, max_length), dtype=compute, device=device)
    except ValueError as error:
        log.warning("speed.unknown reason=%s", error)
        return None
    return measured.flops_per_s.value


def with_link(profile: DeviceProfile, link: Link, inbox: Inbox, stamp: Stamp) -> DeviceProfile:
    """Return *profile* with what it does not say about the link, measured now; see `probe`."""
    if None not in (profile.up_bytes_per_s, profile.down_bytes_per_s, profile.round_trip_s):
        return profile
    return overlaid(DeviceProfile(**probe(link, inbox, stamp)._asdict()), profile)


def changed_profile(
    old: DeviceProfile, by_hand: DeviceProfile, factor: float | None, *, is_link_due: bool
) -> DeviceProfile:
    """Return *old* with its speed times *factor*, its link forgotten where that is to be measured.

    What was set by hand stays.
    """
    new = old
    if factor is not None and old.flops_per_s is not None:
        new = replace(new, flops_per_s=old.flops_per_s * factor)
    if is_link_due:
        new = replace(new, up_bytes_per_s=None, down_bytes_per_s=None, round_trip_s=None)
    return overlaid(new, by_hand)
