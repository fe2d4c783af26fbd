"""Which devices a simulation has: those that are counted, or so many in the same proportions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config.run import DeviceSettings
from coordinator.lab.simulation.config import (
    FleetConfig,
    SimulatedDeviceConfig,
    SimulationConfig,
    device_names,
)


def fleet(counts: list[int], num_devices: int | None = None) -> FleetConfig:
    """A fleet of kinds `k0`, `k1`, ... with a board of its own name each."""
    kinds = {f"k{i}": SimulatedDeviceConfig(board=f"b{i}", count=n) for i, n in enumerate(counts)}
    return FleetConfig(devices=kinds, num_devices=num_devices)


def boards(config: FleetConfig) -> Counter[str]:
    """How many devices there are of each board."""
    return Counter(device.board for device in device_names(config).values())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 100))
def test_so_many_devices_keep_the_proportions(counts: list[int], num_devices: int) -> None:
    """All are there, and no kind has a whole device more or less than its part."""
    found = boards(fleet(counts, num_devices))

    assert sum(found.values()) == num_devices
    for index, count in enumerate(counts):
        assert abs(found[f"b{index}"] - num_devices * count / sum(counts)) < 1


def test_as_many_as_are_counted_are_the_counted_ones() -> None:
    """Names included; of a kind with one device it is the plain one."""
    assert device_names(fleet([1, 2], 3)) == device_names(fleet([1, 2]))
    assert list(device_names(fleet([1, 2], 3))) == ["k0", "k1-0", "k1-1"]
    assert list(device_names(fleet([1, 2], 1))) == ["k1"]


def test_what_cannot_be_generated_is_refused() -> None:
    """No devices, or a device that is one of a kind."""
    with pytest.raises(ValueError, match="num_devices must be at least 1, got 0"):
        fleet([1], 0)
    with pytest.raises(ValueError, match="num_devices: a device has `data` of its own"):
        FleetConfig(devices={"a": SimulatedDeviceConfig(data="a.jsonl")}, num_devices=2)


def test_settings_of_a_kind_are_those_of_each_of_its_devices() -> None:
    """Whoever has settings of its own keeps these, and a device that is alone its plain name."""
    own = {"k0": DeviceSettings(r=2), "k1": DeviceSettings(r=4), "k1-1": DeviceSettings(r=8)}

    config = SimulationConfig(model="any", devices=own, simulation=fleet([1, 3]))

    ranks = {name: config.settings(name).r for name in device_names(config.simulation)}
    assert ranks == {"k0": 2, "k1-0": 4, "k1-1": 8, "k1-2": 4}
    assert "k1" not in config.devices
    assert replace(config, rounds=1).devices == config.devices
