"""What `coordinator compare` compares: a simulation's configuration and the methods to run.

Knows no training; `fit_devices.py` fits a method to a set of devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from coordinator.config.presets import NAMES, load_with_preset
from coordinator.config.run import Preset
from coordinator.lab.simulation.config import SimulationConfig
from edge_sdk.errors import ConfigError

DeviceSet = Literal["homogeneous", "heterogeneous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """A method that is more than a preset."""

    preset: Preset | None = None
    """The preset that lies under the file, if any."""
    settings: tuple[str, ...] = ()
    """`key=value` over the file, as on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSection:
    """Which methods run on which devices, how often, and what they are measured by."""

    presets: tuple[str, ...] = ("hsplitlora", "splitlora", "hetlora", "hlora", "cenlora")
    """Names of presets, or of `methods`."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """Further methods by name."""
    device_sets: tuple[DeviceSet, ...] = ("homogeneous", "heterogeneous")
    """`heterogeneous`: the devices as they are configured; `homogeneous`: as many that are all
    like the one with the median memory."""
    seeds: tuple[int, ...] = (0,)
    """Each seed decides initial adapters, who gets which samples, and their order."""
    learning_rates: tuple[float, ...] = ()
    """Every method tries each rate on the first seed and keeps the one with the lowest final loss,
    for each set of devices; empty: training.learning_rate alone."""
    target: float | None = None
    """Loss that times are measured to; None: the worst of all runs' best losses."""

    def __post_init__(self) -> None:
        for name in ("presets", "device_sets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold different entries, at least 1, got {values}")
        if any(not rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be above 0, got {list(self.learning_rates)}")
        for name in self.presets:
            if name not in NAMES and name not in self.methods:
                known = ", ".join((*NAMES, *self.methods))
                raise ValueError(f"presets: {name!r} is unknown; there are {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig(SimulationConfig):
    """A simulation, and the section `compare`."""

    compare: CompareSection = field(default_factory=CompareSection)
    """What is compared."""

    def simulation_config(self) -> SimulationConfig:
        """Return the configuration of one of the runs."""
        values = {each.name: getattr(self, each.name) for each in fields(SimulationConfig)}
        return SimulationConfig(**values)


def load_compare(
    file: Path | None, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ
) -> CompareConfig:
    """Return the comparison that a file describes, under no method yet.

    Raises:
        ConfigError: as `load_config`; or the file itself names a preset.
    """
    config = load_with_preset(CompareConfig, file, overrides, env)
    if config.preset is not None:
        raise ConfigError("preset: a comparison names its presets in compare.presets; remove it")
    return config


def load_methods(
    config: CompareConfig,
    file: Path | None,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
) -> dict[str, SimulationConfig]:
    """Return the run of every method: its preset under the file, its settings over it.

    Raises:
        ConfigError: the file contradicts one of the presets, or `methods` another thing.
    """
    runs = {}
    for name in config.compare.presets:
        own = config.compare.methods.get(name)
        preset = own.preset if own else name
        settings = own.settings if own else ()
        loaded = load_with_preset(CompareConfig, file, [*overrides, *settings], env, preset=preset)
        runs[name] = loaded.simulation_config()
    return runs
