"""Run methods on the same data, devices, seeds and number of samples; each run is a cell.

    cells = compare(config, load_methods(config, file), folder, print)

A method with devices is simulated; one that the coordinator trains gets the devices' shards joined,
and the time of the coordinator's machine. Runs that have ended stay in `cells.jsonl` and are not
run again. `table.py` summarises cells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.lab.centralised.run import train_pooled
from coordinator.lab.centralised.trainer import MicroShape
from coordinator.lab.comparison.config import CompareConfig, DeviceSet
from coordinator.lab.comparison.fit_devices import (
    Fitted,
    device_set,
    fit,
    samples_of_a_step,
    whole_situation,
)
from coordinator.lab.comparison.table import (
    Held,
    Point,
    RunResult,
    best_rates,
    cell_from_row,
    cell_to_row,
)
from coordinator.lab.simulation.clock import Costs, central_step_s
from coordinator.lab.simulation.config import SimulatedDeviceConfig, SimulationConfig, device_names
from coordinator.lab.simulation.data import deal
from coordinator.lab.simulation.fleet import make_fleet
from coordinator.lab.simulation.result import SimulatedRound, SimulationResult, read_result
from coordinator.results.events import ImportanceMeasured, RunEvent, Watcher
from coordinator.results.history import RunHistory
from coordinator.results.lifecycle import COMPLETED
from coordinator.results.run_folder import RunFolder, digest_of
from edge_sdk.errors import ConfigError
from edge_sdk.files import storage_errors

CELLS = "cells.jsonl"

Progress = Callable[[str], None]
Simulate = Callable[[SimulationConfig, Watcher], SimulationResult]


def compare(
    config: CompareConfig,
    methods: Mapping[str, SimulationConfig],
    out: Path,
    progress: Progress,
    simulate: Simulate,
) -> list[RunResult]:
    """Run everything that has not been run yet; return all cells.

    Args:
        config: What is compared.
        methods: The run of each method, as `load_methods` gives them.
        out: Folder of cells, runs and data.
        progress: Gets a line about each run.
        simulate: Runs a method that trains on devices.

    Raises:
        EdgeError: a config, the data or the model is wrong.
    """
    wanted, cells = config.compare, []
    for kind in wanted.device_sets:
        for method, run in methods.items():
            runner = ComparisonRunner(method, run, kind, out, progress, simulate)
            rates = wanted.learning_rates or (run.training.learning_rate,)
            try:
                tried = [runner.cell(wanted.seeds[0], rate) for rate in rates]
            except ConfigError as error:
                raise ConfigError(f"{method}, {kind} devices: {error}") from error
            best = best_rates(tried)[method, kind]
            cells += [*tried, *(runner.cell(seed, best) for seed in wanted.seeds[1:])]
    return cells


class ComparisonRunner:
    """One method on one set of devices."""

    def __init__(
        self,
        method: str,
        config: SimulationConfig,
        kind: DeviceSet,
        out: Path,
        progress: Progress,
        simulate: Simulate,
    ) -> None:
        self._simulate = simulate
        self._method, self._kind, self._out, self._progress = method, kind, out, progress
        self._config = device_set(config, kind)
        self._folder = RunFolder(out)

    def cell(self, seed: int, rate: float) -> RunResult:
        """Return a run of *seed* at *rate*, from an earlier comparison where that had it."""
        training = replace(self._config.training, seed=seed, learning_rate=rate)
        config = replace(self._config, training=training, runs=self._out / "runs")
        digest = _digest(config)
        name = f"{self._method}, {self._kind}, seed {seed}, rate {rate:g}"
        for row in self._folder.rows(CELLS):
            if row.pop("digest") == digest and row["method"] == self._method:
                return replace(cell_from_row(row), device_set=self._kind)
        folder = f"{self._method}-{self._kind}-{seed}-{rate:g}-{digest}"
        shutil.rmtree(config.runs / folder, ignore_errors=True)  # of a run that was cut off
        config = replace(config, name=folder)
        files = write_shards(config, self._out / "data" / f"seed-{seed}")
        if config.trained_by == "coordinator":
            parts = _pooled(config, files)
        else:
            parts = _simulated(config, files, self._simulate)
        cell = RunResult(method=self._method, device_set=self._kind, seed=seed, rate=rate, **parts)
        self._folder.append(CELLS, {**cell_to_row(cell), "digest": digest})
        self._progress(f"{name}: loss {cell.last.loss:.4f} after {cell.last.samples} samples")
        return cell


def _digest(config: SimulationConfig) -> str:
    """Return a digest that is equal for runs with the same configuration and the same data.

    To a method without devices all devices are alike: only their data and batches count.
    """
    if config.trained_by == "coordinator":
        fleet = config.simulation
        own = {name: SimulatedDeviceConfig(data=d.data) for name, d in fleet.devices.items()}
        settings = {n: replace(d, split=None, r=None) for n, d in config.devices.items()}
        config = replace(config, simulation=replace(fleet, devices=own), devices=settings)
    fleet = config.simulation
    files = (device.data for device in fleet.devices.values())
    plain = replace(config, name=None, runs=Path())
    return digest_of(plain, (fleet.data.path, config.evaluation.data.path, *files))


# ---- data ----


def write_shards(config: SimulationConfig, folder: Path) -> dict[str, str]:
    """Deal the data out and write each share to a file; return the file of every device.

    All methods of a seed read the same files, whoever takes part.
    """
    fleet = config.simulation
    shards = deal(fleet, device_names(fleet), config.training.seed)
    files = {name: device.data for name, device in fleet.devices.items() if device.data}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in shards.items():
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), "utf-8")
            files[name] = str(path)
    return files


# ---- with devices ----


def _simulated(
    config: SimulationConfig, files: Mapping[str, str], simulate: Simulate
) -> dict[str, Any]:
    """Simulate a run and return what a cell holds of it."""
    fitted = fit(config)
    fleet = fitted.config.simulation
    devices = {name: replace(d, data=files[name]) for name, d in fleet.devices.items()}
    config = replace(fitted.config, simulation=replace(fleet, devices=devices))
    watcher = ImportanceWatcher()
    result = simulate(config, watcher)
    folder = result.folder
    if result.outcome != COMPLETED:
        raise KeyboardInterrupt
    for checkpoint in folder.checkpoints():  # a simulation cannot be resumed
        shutil.rmtree(checkpoint)
    return {
        "points": _points(result.rounds, RunHistory(folder).seconds()),
        "held": tuple(_held(round_) for round_ in result.rounds[1:]),
        "importance": tuple(sorted(watcher.importance.items())),
        "notes": fitted.notes,
        **_sizes(fitted, result.rounds[1:]),
    }


class ImportanceWatcher:
    """Collects the importance of every round."""

    def __init__(self) -> None:
        self.importance: dict[int, Mapping[str, float]] = {}

    def see(self, event: RunEvent) -> None:
        """Collect what a round has measured."""
        if isinstance(event, ImportanceMeasured):
            self.importance[event.round] = event.importance


def _held(round_: SimulatedRound) -> dict[str, Held]:
    return {
        name: Held(plan.split, sum(plan.ranks.values()) / max(1, len(plan.ranks)))
        for name, plan in round_.plans.items()
    }


def _sizes(fitted: Fitted, rounds: list[SimulatedRound]) -> dict[str, Any]:
    """Return the largest predicted memory and the most trained numbers of each device."""
    plans = {
        (name, plan.split, tuple(plan.ranks.items()))
        for round_ in rounds
        for name, plan in round_.plans.items()
    }
    peak: dict[str, float] = {}
    trained: dict[str, int] = {}
    for name, split, ranks in sorted(plans):
        peak[name] = max(peak.get(name, 0.0), fitted.peak_bytes(name, split, dict(ranks)))
        trained[name] = max(trained.get(name, 0), fitted.num_trained(dict(ranks)))
    return {"peak_bytes": peak, "trained": trained}


def _points(rounds: list[SimulatedRound], real_s: Mapping[int, float]) -> tuple[Point, ...]:
    """Return the evaluations of a run."""
    points = tuple(
        Point(r.samples, r.seconds, real_s[r.round], r.bytes_up, r.bytes_down, r.loss, r.accuracy)
        for r in rounds
        if r.loss is not None and r.accuracy is not None
    )
    if not points:
        raise ConfigError(
            "evaluation.data.path: names no file, and no device holds out validation data: a "
            "comparison needs one of them"
        )
    return points


# ---- without devices ----


def _pooled(config: SimulationConfig, files: Mapping[str, str]) -> dict[str, Any]:
    """Train on the joined shards, in the time of the coordinator's machine."""
    data = replace(config.simulation.data, path=None, limit=None)
    pooled = replace(
        config.pooled,
        data=data,
        files=tuple(files.values()),
        batch_size=config.pooled.batch_size or samples_of_a_step(config),
    )
    result = train_pooled(replace(config, pooled=pooled).serve_config(), durable=False)
    folder = RunFolder(result.folder)
    rounds = read_result("completed", folder, [{}] * config.rounds).rounds
    ends = _modelled_ends(config, result.shapes)
    timed = [replace(round_, seconds=ends[round_.round]) for round_ in rounds]
    return {"points": _points(timed, RunHistory(folder).seconds())}


def _modelled_ends(config: SimulationConfig, steps: list[tuple[MicroShape, ...]]) -> list[float]:
    """Return when each round ends, in seconds from 0 on."""
    problem = whole_situation(config)
    machine = make_fleet(config.simulation, config.planning).coordinator
    costs = Costs(problem.model, problem.num_blocks)
    rank = config.settings("").r or config.lora.r
    trains_all = config.pooled.trains == "all"
    names = () if trains_all else problem.facts.targets
    ranks = {name: config.lora.rank_of(name, rank) for name in names}
    seconds, ends = 0.0, [0.0]
    for step, micros in enumerate(steps, start=1):
        for count, length, _ in micros:
            flops = costs.flops(0, problem.num_blocks, ranks, count, length, front=True, tail=True)
            # Gradients of inputs and of weights cost a forward pass each.
            total = 3 * flops.forward if trains_all else flops.total
            seconds += central_step_s(total, machine)
        if step % config.steps_per_round == 0:
            ends.append(seconds)
    return ends
