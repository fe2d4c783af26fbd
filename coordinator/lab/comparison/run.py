"""Run methods on the same data, devices, seeds and number of samples; each run is a cell.

    cells = compare(config, load_methods(config, file), folder, print, simulate)

A method with devices is simulated; `undivided_runs.py` has the others. Runs that have ended are
kept and not run again, those of a search as well. `table.py` and `cost_tables.py` summarise cells.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.lab.centralised.run import train_pooled
from coordinator.lab.comparison.cells import Held, RunResult, best_rates
from coordinator.lab.comparison.config import (
    LOCAL,
    CompareConfig,
    CompareSection,
    DeviceSet,
    Disturbance,
)
from coordinator.lab.comparison.fit_devices import Fitted, device_set, fit, mixed_cuts
from coordinator.lab.comparison.kept_cells import (
    MOST_CHANGES,
    KeptCells,
    digest_of_run,
)
from coordinator.lab.comparison.robustness import disturb
from coordinator.lab.comparison.run_count import RoundTeller, RunCount, Tell, tell_nobody
from coordinator.lab.comparison.search.diverged import UntrainedScore, diverged_parts
from coordinator.lab.comparison.search.grid import in_words, next_rate
from coordinator.lab.comparison.undivided_runs import points_of, run_alone, run_pooled, scores_of
from coordinator.lab.simulation.config import SimulationConfig, device_names
from coordinator.lab.simulation.data import deal
from coordinator.lab.simulation.result import SimulatedRound, SimulationResult
from coordinator.results.events.event import RunEvent, Watcher
from coordinator.results.events.plans import ImportanceMeasured
from coordinator.results.history import RunHistory
from coordinator.results.lifecycle import COMPLETED
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from edge_sdk.errors import ConfigError, NumericError
from edge_sdk.files import storage_errors

Simulate = Callable[[SimulationConfig, Watcher], SimulationResult]


def compare(
    config: CompareConfig,
    methods: Mapping[str, SimulationConfig],
    out: Path,
    progress: Tell,
    simulate: Simulate,
    now: Tell = tell_nobody,
) -> list[RunResult]:
    """Run everything that has not been run yet; return all cells.

    Args:
        config: What is compared.
        methods: The run of each method, as `load_methods` gives them.
        out: Folder of cells, runs and data.
        progress: Gets a line about each run.
        simulate: Runs a method that trains on devices.
        now: Gets what is being done at the moment, which takes the place of what it got before.

    Raises:
        EdgeError: a config, the data or the model is wrong.
    """
    (cells,) = compare_each([Comparison(config, methods, out)], progress, simulate, now)
    return cells


@dataclass(frozen=True)
class Comparison:
    """Methods on some devices, with everything else the same."""

    config: CompareConfig
    methods: Mapping[str, SimulationConfig]
    """The run of each method, as `load_methods` gives them."""
    out: Path
    """Folder of its cells, runs and data."""
    name: str = ""
    """What tells it from others that are run with it."""

    def runners(self, simulate: Simulate) -> list[ComparisonRunner]:
        """Return its methods on each set of devices, in order."""
        wanted = self.config.compare
        return [
            ComparisonRunner(method, run, kind, self, simulate)
            for kind in wanted.device_sets
            for method, run in self.methods.items()
            if kind != "one-cut" or mixed_cuts(run)
        ]


def compare_each(
    comparisons: Sequence[Comparison], progress: Tell, simulate: Simulate, now: Tell = tell_nobody
) -> Iterator[list[RunResult]]:
    """Run comparisons one after the other, as `compare` does; yield the cells of each."""
    runners = [comparison.runners(simulate) for comparison in comparisons]
    every = [runner for own in runners for runner in own]
    names = [runner.title for runner in every for _ in range(runner.num_runs)]
    num_searches = sum(bool(runner.wanted.learning_rate_search.most_trials) for runner in every)
    count = RunCount(names, progress, now, time.monotonic, num_searches)
    for comparison, own in zip(comparisons, runners, strict=True):
        kept = KeptCells(comparison.out)
        tell_changes(kept, comparison.config, progress)
        cells = [cell for runner in own for cell in runner.cells(kept, count)]
        count.tell_kept()
        yield cells


def tell_changes(kept: KeptCells, config: CompareConfig, progress: Tell) -> None:
    """Say what is not as it was when a comparison last ran in this folder."""
    changes = kept.changes(config)
    if changes:
        more = len(changes) - MOST_CHANGES
        shown = "; ".join(changes[:MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")
        progress(f"changed since the last call: {shown}; runs that this concerns begin anew")
    if old := kept.num_old():
        progress(f"{old} runs were made by another version of EdgeSplit and do not count")


@dataclass(frozen=True)
class ComparisonRunner:
    """One method on one set of devices."""

    method: str
    config: SimulationConfig
    kind: DeviceSet
    within: Comparison
    simulate: Simulate

    @property
    def wanted(self) -> CompareSection:
        """What is compared."""
        return self.within.config.compare

    @property
    def title(self) -> str:
        """The method, and which comparison it is in where there are several."""
        return f"{self.within.name}: {self.method}" if self.within.name else self.method

    @property
    def _disturbances(self) -> tuple[Disturbance, ...]:
        """What it is run with once more."""
        trains_alone = self.method == LOCAL or self.config.trained_by == "coordinator"
        plain = [kind for kind in self.wanted.device_sets if kind != "one-cut"]
        is_last = plain and self.kind == plain[-1]
        return self.wanted.disturbances if is_last and not trains_alone else ()

    @property
    def _rates(self) -> tuple[float, ...]:
        return self.wanted.learning_rates or (self.config.training.learning_rate,)

    @property
    def num_runs(self) -> int:
        """Number of its runs, without those that its search asks for."""
        return len(self._rates) + len(self.wanted.seeds) - 1 + len(self._disturbances)

    def cells(self, kept: KeptCells, count: RunCount) -> list[RunResult]:
        """Return all of its runs; those that were there before are not run again."""
        first, *others = self.wanted.seeds
        try:
            tried = self._search(first, kept, count)
            best = best_rates(tried)[self.method, self.kind]
            cells = [*tried, *(self._cell(seed, best, kept, count) for seed in others)]
            return cells + [
                cell
                for what in self._disturbances
                if (cell := self._disturbed(first, best, what, kept, count)) is not None
            ]
        except ConfigError as error:
            if self.method != LOCAL:
                raise ConfigError(f"{self.title}, {self.kind} devices: {error}") from error
            for _ in range(self.num_runs):
                count.skip(f"{self.title}, {self.kind}: {error}")
            if self.wanted.learning_rate_search.most_trials:
                count.search_ended()
            return []

    def _search(self, seed: int, kept: KeptCells, count: RunCount) -> list[RunResult]:
        """Return the runs at all rates that are tried, in the order in which they were."""
        search, num_before = self.wanted.learning_rate_search, count.num_run
        tried = [self._cell(seed, rate, kept, count) for rate in self._rates]
        losses = {cell.rate: cell.last.loss for cell in tried}
        while (rate := next_rate(losses, len(self._rates), search)) is not None:
            count.further(self.title)
            tried.append(self._cell(seed, rate, kept, count))
            losses[rate] = tried[-1].last.loss
        if search.most_trials:
            is_news = count.num_run > num_before
            about = f"{self.title}, {self.kind}: {in_words(losses)}"
            count.search_ended(about if is_news else "")
        return tried

    def _run(self, seed: int, rate: float) -> SimulationConfig:
        config = device_set(self.config, self.kind)
        training = replace(config.training, seed=seed, learning_rate=rate)
        return replace(config, training=training, runs=self.within.out / "runs")

    def _cell(
        self,
        seed: int,
        rate: float,
        kept: KeptCells,
        count: RunCount,
        disturbance: Disturbance | None = None,
    ) -> RunResult:
        config = self._run(seed, rate)
        facts: dict[str, Any] = {}
        if disturbance is not None:
            config, names = disturb(config, disturbance, self.wanted, seed)
            facts = {"disturbance": disturbance, "disturbed": names}
        digest = digest_of_run(config)
        found = kept.find(self.method, digest)
        if found is not None:
            count.kept(found[1])
            return replace(found[0], device_set=self.kind)
        name = f"{self.title}, {self.kind}, seed {seed}, rate {rate:g}"
        count.begin(f"{name}, {disturbance}" if disturbance else name)
        parts = self._train(replace(config, name=self._folder(config, digest)), count)
        cell = RunResult(
            method=self.method, device_set=self.kind, seed=seed, rate=rate, **parts, **facts
        )
        came = f"loss {cell.last.loss:.4f} after {round(cell.last.samples)} samples"
        took_s = count.end(came if math.isfinite(cell.last.loss) else "it diverged")
        kept.append(cell, digest, took_s)
        return cell

    def _disturbed(
        self, seed: int, rate: float, what: Disturbance, kept: KeptCells, count: RunCount
    ) -> RunResult | None:
        try:
            return self._cell(seed, rate, kept, count, what)
        except ConfigError as error:
            count.skip(f"{self.title}, {self.kind}, {what}: {error}")
            return None

    def _folder(self, config: SimulationConfig, digest: str) -> str:
        """Return the name of the run's folder, which is not there any more."""
        training = config.training
        folder = f"{self.method}-{self.kind}-{training.seed}-{training.learning_rate:g}-{digest}"
        for left in config.runs.glob(f"{folder}*"):  # of a run that was cut off
            shutil.rmtree(left, ignore_errors=True)
        return folder

    def _train(self, config: SimulationConfig, count: RunCount) -> dict[str, Any]:
        files = write_shards(config, self.within.out / "data" / f"seed-{config.training.seed}")

        before = UntrainedScore()

        def watching(index: int, parts: int, rounds: int) -> Watcher:
            return Watchers([before, RoundTeller(count, rounds, (index, parts))])

        try:
            if self.method == LOCAL:
                return run_alone(config, files, watching, train_pooled)
            if config.trained_by == "coordinator":
                return run_pooled(config, files, watching, train_pooled)
            return _simulated(config, files, self.simulate, watching)
        except NumericError as error:
            return diverged_parts(config, before.score, error)
        finally:
            for folder in config.runs.glob(f"{config.name}*"):
                for checkpoint in RunFolder(folder).checkpoints():
                    shutil.rmtree(checkpoint)  # a simulation cannot be resumed


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
    config: SimulationConfig,
    files: Mapping[str, str],
    simulate: Simulate,
    watching: Callable[[int, int, int], Watcher],
) -> dict[str, Any]:
    """Simulate a run and return what a cell holds of it."""
    try:
        fitted = fit(config)
    except ValueError as error:  # all that are left are to leave
        raise ConfigError(str(error)) from error
    fleet = fitted.config.simulation
    devices = {name: replace(d, data=files[name]) for name, d in fleet.devices.items()}
    config = replace(fitted.config, simulation=replace(fleet, devices=devices))
    watcher = ImportanceWatcher()
    result = simulate(config, Watchers([watcher, watching(0, 1, config.rounds)]))
    if result.outcome != COMPLETED:
        raise KeyboardInterrupt
    return {
        "points": points_of(result.rounds, RunHistory(result.folder).seconds()),
        "held": tuple(_held(round_) for round_ in result.rounds[1:]),
        "importance": tuple(sorted(watcher.importance.items())),
        "notes": fitted.notes,
        "rank_energy": tuple(
            (round_.round, tuple(shares))
            for round_ in result.rounds
            if (shares := round_.metrics.get("rank_energy"))
        ),
        "traffic": result.rounds[-1].traffic,
        "scores": scores_of(result.rounds),
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
