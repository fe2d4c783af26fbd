"""Fit a method to a set of devices: who takes part, with which split and rank, for how long.

Every method gets the same devices, the same data and the same number of samples. Where it cannot
run on a device as configured, it does as its published form would:

* `planning` chooses: there is nothing to fit, and a device that no plan fits drops out;
* the whole model on each device (`split: all`): a device that cannot hold it drops out, with its
  data, and the others take more steps;
* one cut for all: the deepest up to the configured one that the weakest device can hold;
* one rank for all: the largest of `planning.rank_set`, up to the configured one, that the weakest
  device can hold at that cut.

Pure but for the model's config, from which memory is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.config.run import DeviceSettings
from coordinator.lab.comparison.config import DeviceSet
from coordinator.lab.simulation.config import SimulatedDeviceConfig, SimulationConfig, device_names
from coordinator.lab.simulation.fleet import make_fleet
from coordinator.planning.costs import device_bytes
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.problem_files import read_problem
from edge_sdk.errors import ConfigError

# Presets that hold the whole model and give each device the largest rank that fits it.
OWN_RANKS = ("hlora", "hetlora")
MIB = 2**20


@dataclass(frozen=True)
class Fitted:
    """A method that can run on its devices."""

    config: SimulationConfig
    problem: PlanningProblem
    """The problem from which plans and memory of its devices are worked out."""
    notes: tuple[str, ...]
    """Sentences about what was changed, and who dropped out."""

    def peak_bytes(self, device: str, split: int, ranks: Mapping[str, int]) -> float:
        """Return the predicted peak memory of a device's process, in bytes."""
        return device_bytes(self.problem, device, split, ranks)

    def num_trained(self, ranks: Mapping[str, int]) -> int:
        """Return how many numbers the adapters of *ranks* hold."""
        targets = self.problem.facts.targets
        return sum(rank * sum(targets[name]) for name, rank in ranks.items())


def device_set(config: SimulationConfig, kind: DeviceSet) -> SimulationConfig:
    """Return *config* with every device named singly, and changed as *kind* says.

    `homogeneous`: all are alike; `one-cut`: all hold as many blocks as the one that holds least.
    """
    devices = {name: replace(d, count=1) for name, d in device_names(config.simulation).items()}
    settings = {name: config.devices.get(name, DeviceSettings()) for name in devices}
    if kind == "homogeneous":
        median = _median(config, devices)
        devices = {name: replace(median, data=own.data) for name, own in devices.items()}
        settings = {name: replace(own, split=None, r=None) for name, own in settings.items()}
    elif kind == "one-cut" and (cuts := mixed_cuts(config)):
        settings = {name: replace(own, split=min(cuts)) for name, own in settings.items()}
    fleet = replace(config.simulation, devices=devices, num_devices=None)
    return replace(config, simulation=fleet, devices=settings)


def mixed_cuts(config: SimulationConfig) -> set[int]:
    """Return the blocks that the first plans give devices as configured.

    It is empty where all are alike, and where there are none or the method cannot run on any.
    """
    if config.trained_by == "coordinator":
        return set()
    try:
        fitted = fit(device_set(config, "heterogeneous"))
    except ConfigError:
        return set()
    cuts = {plan.split for plan in plan_all(fitted.problem).plans.values()}
    return cuts if len(cuts) > 1 else set()


def _median(
    config: SimulationConfig, devices: Mapping[str, SimulatedDeviceConfig]
) -> SimulatedDeviceConfig:
    """Return the device with the median memory, the smaller of two; the slower of equal ones."""
    profiles = make_fleet(config.simulation, config.planning).profiles

    def budget(name: str) -> tuple[float, float, str]:
        return profiles[name].memory_bytes or 0.0, profiles[name].flops_per_s or 0.0, name

    return devices[sorted(devices, key=budget)[(len(devices) - 1) // 2]]


def samples_of_a_step(config: SimulationConfig) -> float:
    """Return the sequences of one step of all devices, which are named singly.

    Where rounds draw some of them it is the mean over those who can be drawn: all are there.
    """
    devices = config.simulation.devices
    every = sum(config.settings(name).batch_size or 0 for name in devices)
    return every * config.drawn_share(len(devices))


def fit(config: SimulationConfig) -> Fitted:
    """Fit a method to the devices of *config*, which are named singly.

    Raises:
        ConfigError: it cannot run on any of them.
    """
    total = config.total_steps * samples_of_a_step(config)
    if config.preset in OWN_RANKS and _has_one_rank(config):
        config = replace(config, planning=replace(config.planning, ranks="uniform"))
    problem = whole_situation(config)
    lost = _cannot_take_part(config, problem)
    if len(lost) == len(problem.profiles):
        raise ConfigError(f"it cannot run on any device: {next(iter(lost.values()))}")
    config = _without(config, lost)
    remaining = {name: p for name, p in problem.profiles.items() if name not in lost}
    problem = replace(problem, profiles=remaining)
    config, changes = _lowered(config, problem)
    a_round = samples_of_a_step(config) * config.steps_per_round
    config = replace(config, rounds=max(1, round(total / a_round)))
    told = replace(config, planning=problem.config.planning).serve_config()
    notes = [*(f"without {name}: {reason}" for name, reason in lost.items()), *changes]
    return Fitted(config, replace(problem, config=told), tuple(notes))


def whole_situation(config: SimulationConfig) -> PlanningProblem:
    """Return what the simulation will plan from: all devices, and the coordinator's board."""
    fleet = make_fleet(config.simulation, config.planning)
    planning = replace(
        config.planning,
        server_memory_bytes=fleet.coordinator_bytes,
        server_flops_per_s=fleet.coordinator.flops_per_s,
    )
    return read_problem(replace(config, planning=planning).serve_config(), fleet.profiles, None)


# ---- who takes part ----


def _cannot_take_part(config: SimulationConfig, problem: PlanningProblem) -> dict[str, str]:
    """Return devices that can hold no part of the model under this method, and why."""
    if not problem.is_fixed:
        return plan_all(problem).refused
    reasons, least = {}, problem
    if _has_one_rank(config):
        least = _with_rank(problem, min(config.planning.rank_set))
    for device in problem.profiles:
        split = 1 if _has_one_split(config) else problem.pinned_split(device)
        assert split is not None, "a fixed config gives everybody a split"
        own = config.devices.get(device, DeviceSettings()).r
        needed = _bytes_of(least, device, split, own or min(config.planning.rank_set))
        if needed > problem.budget_bytes(device):
            reasons[device] = (
                f"{split} of {problem.num_blocks} blocks need {needed / MIB:,.1f} MiB, "
                f"it has {problem.budget_bytes(device) / MIB:,.1f}"
            )
    return reasons


def _without(config: SimulationConfig, lost: Mapping[str, str]) -> SimulationConfig:
    fleet = config.simulation
    remaining = {name: device for name, device in fleet.devices.items() if name not in lost}
    settings = {name: own for name, own in config.devices.items() if name not in lost}
    return replace(config, simulation=replace(fleet, devices=remaining), devices=settings)


# ---- one cut, one rank ----


def _has_one_split(config: SimulationConfig) -> bool:
    """Return whether all devices are cut at one block that leaves the coordinator some."""
    if config.planning.split != "fixed" or config.settings("").split == "all":
        return False
    return all(device.split is None for device in config.devices.values())


def _has_one_rank(config: SimulationConfig) -> bool:
    """Return whether neither planning nor the settings of single devices choose ranks."""
    return config.planning.ranks == "fixed" and all(d.r is None for d in config.devices.values())


def _lowered(
    config: SimulationConfig, problem: PlanningProblem
) -> tuple[SimulationConfig, list[str]]:
    """Lower the one cut and the one rank to what the weakest device can hold."""
    default, ranks = config.settings(""), config.planning.rank_set
    split, rank = default.split, default.r
    assert split is not None
    assert rank is not None
    found_split, found_rank = split, rank
    if _has_one_split(config) and not isinstance(split, str):
        deeper = range(min(split, problem.num_blocks), 1, -1)
        least = min(ranks) if _has_one_rank(config) else rank
        fits = (k for k in deeper if _all_hold(problem, k, least))
        found_split = next(fits, 1)
    if _has_one_rank(config):
        blocks = problem.num_blocks if isinstance(found_split, str) else found_split
        smaller = sorted({rank, *(r for r in ranks if r < rank)}, reverse=True)
        fits = (r for r in smaller if _all_hold(problem, blocks, r))
        found_rank = next(fits, smaller[-1])
    pairs = (("split", split, found_split), ("rank", rank, found_rank))
    notes = [f"{what} {got} instead of {asked}" for what, asked, got in pairs if got != asked]
    settings = replace(config.default, split=found_split, r=found_rank)
    return replace(config, default=settings, lora=replace(config.lora, r=found_rank)), notes


def _all_hold(problem: PlanningProblem, split: int, rank: int) -> bool:
    lowered = _with_rank(problem, rank)
    return all(
        _bytes_of(lowered, device, split, rank) <= problem.budget_bytes(device)
        for device in problem.profiles
    )


def _with_rank(problem: PlanningProblem, rank: int) -> PlanningProblem:
    """Return the same with one rank for all: what others hold counts in the frozen residual."""
    config = problem.config
    lora, default = replace(config.lora, r=rank), replace(config.default, r=rank)
    return replace(problem, config=replace(config, lora=lora, default=default))


def _bytes_of(problem: PlanningProblem, device: str, split: int, rank: int) -> float:
    names = problem.weights(0, split)
    ranks = {name: problem.config.lora.rank_of(name, rank) for name in names}
    return device_bytes(problem, device, split, ranks)
