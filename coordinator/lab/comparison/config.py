"""What `coordinator compare` compares: a simulation's configuration and the methods to run.

Knows no training; `fit_devices.py` fits a method to a set of devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from coordinator.config.presets import NAMES, load_with_preset, preset_text
from coordinator.config.run import Preset
from coordinator.lab.comparison.published.config import PaperSection
from coordinator.lab.comparison.search.config import RateSearchConfig
from coordinator.lab.simulation.config import SimulationConfig
from edge_sdk.errors import ConfigError

DeviceSet = Literal["homogeneous", "heterogeneous", "one-cut"]
Disturbance = Literal["dropouts", "stragglers"]
Labels = Literal["device", "server", "published"]

LOCAL = "local"
"""Name of the row in which each device trains alone."""
CENTRALISED = "cenlora"
"""Preset of the row in which all data is in one place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """A method that is more than a preset."""

    preset: Preset | None = None
    """The preset that lies under the file, if any."""
    settings: tuple[str, ...] = ()
    """`key=value` over the file, as on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """What a run may have cost when its quality is looked at; see docs/compare.md.

    None: the least that any method with devices has spent in its whole run.
    """

    bytes: float | None = None
    """Bytes that all devices have sent and received."""
    seconds: float | None = None
    """Seconds on the modelled clock."""
    joules: float | None = None
    """Joules that all devices have spent on computing."""

    def __post_init__(self) -> None:
        for name in ("bytes", "seconds", "joules"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSection:
    """Which methods run on which devices, how often, and what they are measured by."""

    presets: tuple[str, ...] = ("hsplitlora", "splitlora", "hetlora", "hlora", "cenlora")
    """Names of presets, or of `methods`."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """Further methods by name."""
    device_sets: tuple[DeviceSet, ...] = ("homogeneous", "heterogeneous")
    """`heterogeneous`: the devices as they are configured; `homogeneous`: as many that are all
    like the one with the median memory; `one-cut`: as configured, but with the cuts of methods
    that have several all where the shallowest one is, to see what mixed cuts cost."""
    reference: str | None = None
    """The row that the others are compared with, pair by pair of seeds; None: the first of
    `presets`."""
    seeds: tuple[int, ...] = (0,)
    """Each seed decides initial adapters, who gets which samples, and their order."""
    learning_rates: tuple[float, ...] = ()
    """Every method tries each rate on the first seed and keeps the one with the lowest final loss,
    for each set of devices; empty: training.learning_rate alone. `learning_rate_search` goes on
    from there."""
    learning_rate_search: RateSearchConfig = field(default_factory=RateSearchConfig)
    """How rates beyond `learning_rates` are searched, until the best one has a worse one on both
    sides."""
    steps: int | None = None
    """Steps of every device in the whole run, from which rounds follow: `steps / steps_per_round`,
    to the nearest; None: `rounds` as configured."""
    target: float | None = None
    """Loss that costs are measured to; None: what `target_gain` says."""
    target_gain: float = 0.9
    """Share of the gain of `cenlora` over the untrained model that makes the target; without
    that row, the lowest loss that every run reached is the target."""
    labels: Labels | None = None
    """Where the labels are for every method, whatever its preset says: `device` or `server`;
    `published`: where each preset has them. None: as `labels` of the run. What `settings` of a
    method say counts for that method; a device that holds the whole model keeps its labels."""
    references: tuple[Literal["local", "cenlora"], ...] = ("local", "cenlora")
    """Rows that stand beside the methods: each device alone, without any exchange, and all data in
    one place."""
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    """What the table of quality under a budget looks at."""
    disturbances: tuple[Disturbance, ...] = ("dropouts", "stragglers")
    """What every method with devices is run with once more: on the first seed, at its rate, on the
    last of `device_sets` that is not `one-cut`."""
    dropout_share: float = 0.2
    """Share of the devices, at least one, that leave for good in the middle third of the run."""
    straggler_share: float = 0.2
    """Share of the devices, at least one, that are slower than their profile says."""
    straggler_factor: float = 4.0
    """How many times slower they compute and send."""

    def __post_init__(self) -> None:
        for name in ("presets", "device_sets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold different entries, at least 1, got {values}")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates must be different, got {list(self.learning_rates)}")
        if any(not rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be above 0, got {list(self.learning_rates)}")
        for name in self.presets:
            if name not in NAMES and name not in self.methods:
                known = ", ".join((*NAMES, *self.methods))
                raise ValueError(f"presets: {name!r} is unknown; there are {known}")
        rows = (*self.presets, *self.references)
        if self.reference is not None and self.reference not in rows:
            known = ", ".join(dict.fromkeys(rows))
            raise ValueError(f"reference: {self.reference!r} is no row; there are {known}")
        if LOCAL in self.methods:
            raise ValueError(f"methods: {LOCAL!r} is the row of devices alone; choose another name")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.target_gain <= 1:
            raise ValueError(f"target_gain must be above 0 and at most 1, got {self.target_gain}")
        for name in ("dropout_share", "straggler_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.straggler_factor >= 1:
            raise ValueError(f"straggler_factor must be at least 1, got {self.straggler_factor}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig(SimulationConfig):
    """A simulation, and the sections `compare` and `paper`."""

    compare: CompareSection = field(default_factory=CompareSection)
    """What is compared."""
    paper: PaperSection | None = None
    """Whose experiment this is, and what was published of it; see docs/papers.md."""

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
        # What the preset says is said again, so that the file's `labels` contradict nothing here.
        published = _published_labels(preset)
        layers = [*overrides, *(f"labels={where}" for where in published), *settings]
        loaded = load_with_preset(CompareConfig, file, layers, env, preset=preset)
        run = loaded.simulation_config()
        is_told = any(setting.startswith("labels=") for setting in settings)
        runs[name] = run if is_told else _with_labels(run, config)
    if LOCAL in config.compare.references:
        runs[LOCAL] = alone(config.simulation_config())
    if CENTRALISED in config.compare.references and CENTRALISED not in runs:
        central = load_with_preset(CompareConfig, file, overrides, env, preset=CENTRALISED)
        runs[CENTRALISED] = central.simulation_config()
    return {name: _with_steps(run, config.compare.steps) for name, run in runs.items()}


def _with_steps(run: SimulationConfig, steps: int | None) -> SimulationConfig:
    """Return *run* with as many rounds as make *steps*, if that is said."""
    if steps is None:
        return run
    return replace(run, rounds=max(1, round(steps / run.steps_per_round)))


def labels_for_all(config: CompareConfig) -> Labels:
    """Return where the labels of every method are, or `published`."""
    return config.compare.labels or config.labels


def alone(config: SimulationConfig) -> SimulationConfig:
    """Return the run of devices that each hold the whole model, with ranks that fit them."""
    planning = replace(config.planning, split="fixed", ranks="uniform")
    settings = {name: replace(d, split=None, r=None) for name, d in config.devices.items()}
    default = replace(config.default, split="all")
    return replace(
        config, preset=None, planning=planning, default=default, devices=settings, labels="device"
    )


def _published_labels(preset: str | None) -> list[str]:
    """Return where *preset* has the labels, if it says so."""
    lines = preset_text(preset).splitlines() if preset is not None else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith("labels:")]


def _with_labels(run: SimulationConfig, config: CompareConfig) -> SimulationConfig:
    """Return *run* with the labels where all methods have them."""
    wanted = labels_for_all(config)
    holds_all = run.settings("").split == "all"
    if wanted == "published" or run.trained_by == "coordinator" or holds_all:
        return run
    return replace(run, labels=wanted)
