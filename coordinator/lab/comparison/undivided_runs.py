"""Runs in which the model is never cut: all data in one place, or each device for itself.

Both train as a centralised run does, in the modelled time of the machine that they are on, and give
the parts of a cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from coordinator.config.run import ServeConfig
from coordinator.config.scoring import scores_in
from coordinator.lab.centralised.trainer import MicroShape
from coordinator.lab.comparison.cells import Held, Point
from coordinator.lab.comparison.fit_devices import (
    Fitted,
    fit,
    samples_of_a_step,
    whole_situation,
)
from coordinator.lab.simulation.clock import Costs, Machine, central_step_s
from coordinator.lab.simulation.config import SimulationConfig
from coordinator.lab.simulation.fleet import make_fleet
from coordinator.lab.simulation.result import SimulatedRound, read_result
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem
from coordinator.results.events.event import Watcher
from coordinator.results.history import RunHistory
from coordinator.results.run_folder import RunFolder
from edge_sdk.errors import ConfigError

Watching = Callable[[int, int, int], Watcher]
"""Gives who looks on at part n of so many, of so many rounds each."""


class TrainedAlone(Protocol):
    """What is needed of a run's result."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""

    @property
    def shapes(self) -> Sequence[Sequence[MicroShape]]:
        """Micro-batches of every step."""


class TrainPooled(Protocol):
    """`coordinator.lab.centralised.run.train_pooled`, as far as it is needed here."""

    def __call__(
        self, config: ServeConfig, *, watcher: Watcher | None, durable: bool
    ) -> TrainedAlone:
        """Train on pooled data and return what each evaluation found."""


def points_of(rounds: Sequence[SimulatedRound], real_s: Mapping[int, float]) -> tuple[Point, ...]:
    """Return the evaluations of a run.

    Args:
        rounds: The rounds of the run.
        real_s: Seconds on this machine until each round was done.
    """
    points = tuple(
        Point(
            r.samples,
            r.seconds,
            real_s[r.round],
            r.bytes_up,
            r.bytes_down,
            r.loss,
            r.accuracy,
            r.energy_j,
        )
        for r in rounds
        if r.loss is not None and r.accuracy is not None
    )
    if not points:
        raise ConfigError(
            "evaluation.data.path: names no file, and no device holds out validation data: a "
            "comparison needs one of them"
        )
    return points


def scores_of(rounds: Sequence[SimulatedRound]) -> dict[str, float]:
    """Return the scores of `evaluation.scores` in the last row of a run; empty without any."""
    return scores_in(rounds[-1].metrics.get("eval", {}))


# ---- all data in one place ----


def run_pooled(
    config: SimulationConfig, files: Mapping[str, str], watching: Watching, train: TrainPooled
) -> dict[str, Any]:
    """Train on the joined shards, in the time of the coordinator's machine."""
    batch_size = config.pooled.batch_size or max(1, round(samples_of_a_step(config)))
    pooled = _pooled(config, tuple(files.values()), batch_size, config.pooled.micro_batch)
    machine = make_fleet(config.simulation, config.planning).coordinator
    watcher = watching(0, 1, config.rounds)
    points, scores = _train(train, pooled, whole_situation(config), machine, watcher)
    return {"points": points, "scores": scores, "is_central": True}


def _pooled(
    config: SimulationConfig, files: tuple[str, ...], batch_size: int, micro_batch: int | None
) -> ServeConfig:
    """Return the run of one machine that has *files*."""
    pooled = replace(
        config.pooled,
        data=replace(config.simulation.data, path=None, limit=None),
        files=files,
        batch_size=batch_size,
        micro_batch=micro_batch,
    )
    return replace(config, trained_by="coordinator", pooled=pooled).serve_config()


def _train(
    train: TrainPooled,
    config: ServeConfig,
    problem: PlanningProblem,
    machine: Machine,
    watcher: Watcher,
) -> tuple[tuple[Point, ...], dict[str, float]]:
    """Train; return the evaluations, with modelled time and energy of *machine*, and scores."""
    result = train(config, watcher=watcher, durable=False)
    folder = RunFolder(result.folder)
    rounds = read_result("completed", folder, [{}] * config.rounds).rounds
    ends = _modelled_ends(config, problem, machine, result.shapes)
    timed = [
        replace(r, seconds=ends[r.round], energy_j=ends[r.round] * machine.watts) for r in rounds
    ]
    return points_of(timed, RunHistory(folder).seconds()), scores_of(rounds)


def _modelled_ends(
    config: ServeConfig,
    problem: PlanningProblem,
    machine: Machine,
    steps: Sequence[Sequence[MicroShape]],
) -> list[float]:
    """Return when each round ends, in seconds from 0 on."""
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


# ---- each device for itself ----


def run_alone(
    config: SimulationConfig, files: Mapping[str, str], watching: Watching, train: TrainPooled
) -> dict[str, Any]:
    """Train the whole model on each device that can hold it, on its own data; nothing travels.

    Every device does as many rounds as it would with the others, on average where they are drawn.
    Loss, accuracy and scores are means over these devices, samples and energy sums, time that of
    the slowest.

    Raises:
        ConfigError: no device can hold the model.
    """
    fitted = fit(config)
    machines = make_fleet(fitted.config.simulation, fitted.config.planning).machines
    ranks = {name: dict(plan.ranks) for name, plan in plan_all(fitted.problem).plans.items()}
    names = sorted(machines)
    config = replace(config, rounds=max(1, round(config.rounds * config.drawn_share(len(names)))))
    runs, scored = [], []
    for index, name in enumerate(names):
        own = _of_device(config, name, max(ranks[name].values()))
        settings = config.settings(name)
        pooled = _pooled(own, (files[name],), settings.batch_size or 1, settings.micro_batch)
        watcher = watching(index, len(names), config.rounds)
        points, scores = _train(train, pooled, fitted.problem, machines[name], watcher)
        runs.append(points)
        scored.append(scores)
    last = {name: points[-1].loss for name, points in zip(names, runs, strict=True)}
    spread = f"each device alone ends at a loss of {min(last.values()):.4f}"
    others = [note for note in fitted.notes if note.startswith("without ")]
    return {
        "points": tuple(_join(moment) for moment in zip(*runs, strict=True)),
        "scores": {key: statistics.fmean(own[key] for own in scored) for key in scored[0]},
        "held": tuple(_held(fitted, ranks) for _ in range(config.rounds)),
        "peak_bytes": {n: fitted.peak_bytes(n, fitted.problem.num_blocks, ranks[n]) for n in names},
        "trained": {n: fitted.num_trained(ranks[n]) for n in names},
        "notes": (f"{spread} to {max(last.values()):.4f}", *others),
    }


def _of_device(config: SimulationConfig, name: str, rank: int) -> SimulationConfig:
    """Return the run of one device, in a folder of its own."""
    default = replace(config.default, r=rank)
    return replace(config, default=default, name=f"{config.name}-{name}")


def _held(fitted: Fitted, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Held]:
    blocks = fitted.problem.num_blocks
    return {n: Held(blocks, sum(own.values()) / max(1, len(own))) for n, own in ranks.items()}


def _join(points: Sequence[Point]) -> Point:
    """Return what all devices are worth when each has evaluated as often."""
    return Point(
        samples=sum(p.samples for p in points),
        modelled_s=max(p.modelled_s for p in points),
        real_s=sum(p.real_s for p in points),
        bytes_up=0,
        bytes_down=0,
        loss=statistics.fmean(p.loss for p in points),
        accuracy=statistics.fmean(p.accuracy for p in points),
        energy_j=sum(p.energy_j for p in points),
    )
