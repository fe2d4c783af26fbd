"""Ranks by importance against one rank for all: what the planner's choice is worth, in one model.

    OMP_NUM_THREADS=1 python benchmarks/rank_choice.py --out ranks [--only e2e-stories] [--report]

One process trains the whole model with PEFT, with the ranks that `coordinator/planning` chooses and
the scales that are named: which weights get how many ranks is all that differs. What each
arm may spend is what rank 4 on every weight takes: either in numbers trained, or in bytes of a
device, kept activations included. Every arm searches its learning rate on the first seed, by
factors of 2, until the best is inside. Runs are kept in OUT/SET.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods_experiments import (
    AT_EQUAL_BYTES,
    DEVICES,
    Experiment,
    adapter_budget,
    make_config,
    write_data,
)
from methods_report import interval
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from pictures import draw_intervals
from rank_choice_sets import RANK_SETS, RankSet, Row
from report import header, kept_parser, save, table

from coordinator.lab.comparison.config import load_compare
from coordinator.lab.comparison.fit_devices import whole_situation
from coordinator.lab.comparison.statistics.estimate import estimate
from coordinator.planning.costs import Load, adapters_bytes, device_loads
from coordinator.planning.pricing.rank_tables import rank_tables
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.ranks import choose_ranks
from edge_sdk.command import quiet_libraries

SEEDS = (0, 1, 2, 3, 4)
STEPS, BATCH, WARMUP = 60, 16, 5
IMPORTANCE_BATCHES, LATER_STEPS = 4, 20
UNIFORM, ALPHA = 4, 16.0
MOST_RATES = 6
UNIFORM_ARM = "uniform"


@dataclass(frozen=True)
class Arm:
    """One way to choose ranks, and the scale of what they add."""

    by_importance: bool = True
    rank: int = UNIFORM
    """Rank of every weight, where importance does not choose."""
    power: float = 1.0
    """The scale falls with this power of the rank: 1 is LoRA's, 0.5 rsLoRA's, with 0 it is fixed.
    At rank UNIFORM it is the same for all."""
    equal_bytes: bool = False
    """Whether kept activations count, too; else the numbers trained alone."""
    later: bool = False
    """Whether importance is measured after some steps; else before anything is learned."""
    shuffled: bool = False
    """Whether importance is dealt out at random: what is left without its information."""


ARMS = {
    UNIFORM_ARM: Arm(by_importance=False),
    "rngwp": Arm(),
    "rngwp, fixed scale": Arm(power=0.0),
    "rngwp, rsLoRA": Arm(power=0.5),
    "rngwp, measured later": Arm(later=True),
    "rngwp, shuffled": Arm(shuffled=True),
    "rngwp, equal bytes": Arm(equal_bytes=True),
    # What so many bytes buy without importance: weights left out at random; and the planner's
    # largest rank on every weight, which takes a few percent more.
    "shuffled, equal bytes": Arm(equal_bytes=True, shuffled=True),
    "uniform, rank 8": Arm(by_importance=False, rank=2 * UNIFORM),
}


class Bench:
    """A set: its rows, and the planner's view of its model."""

    def __init__(self, name: str, out: Path) -> None:
        """Read the data and describe the model to the planner."""
        self.set: RankSet = RANK_SETS[name]
        self.train, self.dev = self.set.rows(out / "data")
        data = "banking" if self.set.is_classifier else "e2e"
        config = make_config(
            Experiment(data, self.set.model, dict(AT_EQUAL_BYTES)), out / "data", smoke=False
        )
        config["default"]["split"] = "all"
        config["planning"] |= {"ranks": "rngwp", "split": "fixed"}
        file = out / f"{name}.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        self.problem: PlanningProblem = whole_situation(load_compare(file).simulation_config())
        self.shapes = dict(self.problem.facts.targets)
        self._places = _places(self.set.make_model(), self.shapes)
        self._importance: dict[tuple[int, bool], dict[str, float]] = {}

    def ranks(self, arm: Arm, seed: int) -> dict[str, int]:
        """The ranks of an arm; of a weight without an adapter 0."""
        if not arm.by_importance:
            return dict.fromkeys(self.shapes, arm.rank)
        importance = dict(self._measured(seed, later=arm.later))
        if arm.shuffled:
            values = list(importance.values())
            random.Random(seed).shuffle(values)
            importance = dict(zip(importance, values, strict=True))
        problem = replace(self.problem, importance=importance)
        loads = device_loads(problem, DEVICES[0], problem.num_blocks)
        if arm.equal_bytes:
            return choose_ranks(rank_tables(problem, DEVICES[0], loads), adapter_budget(problem))
        idle = dict.fromkeys(loads, Load(tokens=0, in_flight=0))
        budget = adapters_bytes(problem, dict.fromkeys(idle, UNIFORM), idle)
        return choose_ranks(rank_tables(problem, DEVICES[0], idle), budget)

    def run(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """Train once, and say what came of it."""
        ranks = {name: rank for name, rank in self.ranks(arm, seed).items() if rank}
        model = self._train(ranks, arm.power, rate, seed, STEPS)
        loss, accuracy = self.set.evaluate(model, self.dev)
        trained = sum(rank * sum(self.shapes[name][-2:]) for name, rank in ranks.items())
        return {
            "loss": loss,
            "accuracy": accuracy,
            "trained": trained,
            "adapted": len(ranks) / len(self.shapes),
            "rank": sum(ranks.values()) / len(self.shapes),
        }

    def _train(
        self, ranks: Mapping[str, int], power: float, rate: float, seed: int, steps: int
    ) -> Any:
        model = self.set.make_model()
        torch.manual_seed(seed)
        model = get_peft_model(model, self._peft(ranks, power))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        model.train()
        for step, rows in enumerate(self._batches(seed, steps)):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            model(**self.set.batch(rows)).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model

    def _peft(self, ranks: Mapping[str, int], power: float) -> PeftConfig:
        places = {name: self._places[name] for name in ranks}
        return PeftConfig(
            r=1,
            target_modules=list(places.values()),
            rank_pattern={_exactly(places[n]): rank for n, rank in ranks.items()},
            alpha_pattern={_exactly(places[n]): alpha(rank, power) for n, rank in ranks.items()},
            modules_to_save=["classifier"] if self.set.is_classifier else None,
            task_type="SEQ_CLS" if self.set.is_classifier else "CAUSAL_LM",
        )

    def _batches(self, seed: int, steps: int) -> Iterator[list[Row]]:
        draw = random.Random(seed)
        left: list[Row] = []
        for _ in range(steps):
            if len(left) < BATCH:
                left = draw.sample(self.train, len(self.train))
            yield [left.pop() for _ in range(BATCH)]

    def _measured(self, seed: int, *, later: bool) -> dict[str, float]:
        """RNGWP's numerator, sum |w dL/dw|, over some batches."""
        if (seed, later) not in self._importance:
            if later:
                ranks, rate = dict.fromkeys(self.shapes, UNIFORM), self.set.first_rate
                model = self._train(ranks, 1.0, rate, seed, LATER_STEPS).merge_and_unload()
            else:
                model = self.set.make_model()
            self._importance[seed, later] = self._products(model, seed)
        return self._importance[seed, later]

    def _products(self, model: Any, seed: int) -> dict[str, float]:
        model.requires_grad_(requires_grad=False)
        weights = {n: model.get_submodule(place).weight for n, place in self._places.items()}
        for weight in weights.values():
            weight.requires_grad_(requires_grad=True)
        found = dict.fromkeys(weights, 0.0)
        for rows in self._batches(100 + seed, IMPORTANCE_BATCHES):
            model.zero_grad()
            model(**self.set.batch(rows)).loss.backward()
            for name, weight in weights.items():
                found[name] += float((weight.grad * weight).abs().sum())
        return found


def _places(model: Any, weights: Mapping[str, Any]) -> dict[str, str]:
    """The module of each weight in the model of transformers."""
    names = [name for name, _ in model.named_modules()]
    return {
        weight: next(n for n in names if n == weight or n.endswith(f".{weight}"))
        for weight in weights
    }


def alpha(rank: int, power: float) -> float:
    """The alpha with which PEFT, which divides it by the rank, gives that scale."""
    return ALPHA / UNIFORM * rank * (UNIFORM / rank) ** power


def _exactly(place: str) -> str:
    return f"^{re.escape(place)}$"


# ---- runs ----


def run_set(name: str, out: Path, arms: Sequence[str]) -> None:
    """Run what is missing of a set: every one of *arms* at its own rate."""
    bench, file = Bench(name, out), out / f"{name}.jsonl"
    known = {(r["arm"], r["rate"], r["seed"]): r for r in _rows(file)}

    def loss(arm: str, rate: float, seed: int) -> float:
        if (arm, rate, seed) not in known:
            found = bench.run(ARMS[arm], rate, seed)
            row = {"arm": arm, "rate": rate, "seed": seed, **found}
            known[arm, rate, seed] = row
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(f"{name}: {arm}, rate {rate:g}, seed {seed}: loss {row['loss']:.4f}", flush=True)
        found_loss = float(known[arm, rate, seed]["loss"])
        return found_loss if math.isfinite(found_loss) else math.inf

    best = {
        arm: best_rate(bench.set.first_rate, lambda r, a=arm: loss(a, r, SEEDS[0])) for arm in arms
    }
    for seed in SEEDS[1:]:
        for arm in arms:
            loss(arm, best[arm], seed)


def best_rate(first: float, loss: Any) -> float:
    """Search by factors of 2 from *first* until the best has a worse one on either side."""
    losses = {first: loss(first)}
    while len(losses) < MOST_RATES:
        best = min(losses, key=losses.__getitem__)
        missing = [rate for rate in (best / 2, best * 2) if rate not in losses]
        if not missing:
            break
        losses[missing[0]] = loss(missing[0])
    return min(losses, key=losses.__getitem__)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


# ---- the report ----

HOW = f"""\
{STEPS} steps of {BATCH} rows, AdamW, {WARMUP} steps of warm-up, ranks from {{1, 2, 4, 8}} or none,
seeds {", ".join(map(str, SEEDS))}; in one process, without devices. Budget: the numbers that rank
{UNIFORM} on every weight trains; `equal bytes`: the device's bytes that it takes, in which kept
activations are by far the most, so that twice the ranks cost a few percent. Each arm at its own
best learning rate of seed {SEEDS[0]}, found by factors of 2. Differences are paired by seed; in
brackets their 95 % interval by Student's t; p is the exact sign-flip test, not corrected for the
number of rows (with five seeds it is never below 0.063)."""


def write_report(out: Path, options: argparse.Namespace) -> None:
    """Write what has run."""
    parts = [header("Ranks by importance against one rank for all", options), HOW]
    drawn = {}
    for name in RANK_SETS:
        if rows := _rows(out / f"{name}.jsonl"):
            parts += [f"## {name}", _set_table(rows)]
            changes = {arm: _percent(rows, arm) for arm in ARMS if arm != UNIFORM_ARM}
            drawn[name] = [(arm, estimate(own) if own else None) for arm, own in changes.items()]
    draw_intervals("rank-choice", drawn, "change of the loss (%)")
    save("rank-choice", "\n\n".join(parts))


def _set_table(rows: list[dict[str, Any]]) -> str:
    chosen = {arm: own for arm in ARMS if (own := _at_best_rate(rows, arm))}
    base = {row["seed"]: row for row in chosen.get(UNIFORM_ARM, [])}
    lines = []
    for arm, own in chosen.items():
        loss = statistics.fmean(row["loss"] for row in own)
        accuracy = 100 * statistics.fmean(row["accuracy"] for row in own)
        paired = [(row, base[row["seed"]]) for row in own if row["seed"] in base]
        percent = _percent(rows, arm)
        points = [100 * (row["accuracy"] - other["accuracy"]) for row, other in paired]
        is_base = arm == UNIFORM_ARM
        lines.append(
            (
                arm,
                f"{own[0]['rate']:g}",
                len(own),
                f"{loss:.4f}",
                "" if is_base else interval(estimate(percent), 1),
                f"{accuracy:.1f}",
                "" if is_base else interval(estimate(points), 1),
                "" if is_base or len(own) < 2 else f"{estimate(percent).p:.2f}",
                f"{statistics.fmean(row['trained'] for row in own):,.0f}",
                f"{100 * statistics.fmean(row['adapted'] for row in own):.0f} %",
            )
        )
    heads = (
        "ranks|rate|seeds|loss|change of loss (%)|accuracy (%)|points|p of the loss|trained|weights"
    )
    return table(heads.split("|"), lines)


def _percent(rows: list[dict[str, Any]], arm: str) -> list[float]:
    """By how many percent an arm's loss differs from that of one rank for all, by seed."""
    base = {row["seed"]: float(row["loss"]) for row in _at_best_rate(rows, UNIFORM_ARM)}
    own = _at_best_rate(rows, arm)
    return [100 * (float(r["loss"]) / base[r["seed"]] - 1) for r in own if r["seed"] in base]


def _at_best_rate(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    own = [row for row in rows if row["arm"] == arm]
    if not own:
        return []
    rate = min((r for r in own if r["seed"] == SEEDS[0]), key=lambda row: row["loss"])["rate"]
    return sorted((r for r in own if r["rate"] == rate), key=lambda row: row["seed"])


def main() -> None:
    """Run what is missing; report what is there."""
    parser = kept_parser(__doc__, "ranks", RANK_SETS)
    parser.add_argument("--arms", nargs="+", default=[], choices=ARMS, metavar="ARM")
    options = parser.parse_args()
    quiet_libraries()
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        write_data(options.out / "data", smoke=False)
        for name in options.only or RANK_SETS:
            run_set(name, options.out, options.arms or list(ARMS))
    write_report(options.out, options)


if __name__ == "__main__":
    main()
