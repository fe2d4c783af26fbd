"""Sweeps: skewed data, number of devices, local steps, and the energy of dW by rank over rounds.

    OMP_NUM_THREADS=1 python benchmarks/sweeps.py --out sweeps [--only skew] [--report] [--smoke]

Each is `coordinator compare OUT/NAME.json --sweep KEY=...`: data, models and budgets of
benchmarks/methods.py, and learning rates that `compare` searches for where there is time. What has
run is kept in OUT and not run again; sweeps may be run by several processes at once. Tables go to
benchmarks/results/, pictures to docs/plots/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

from methods_experiments import (
    ROOMY,
    SLOWED,
    SLOWER,
    Experiment,
    make_config,
    set_budgets,
    write_data,
)
from pictures import keep
from report import header, kept_parser, save

from coordinator.cli import main as coordinator
from edge_sdk.command import quiet_libraries

METHODS: dict[str, tuple[str | None, list[str]]] = {
    name: (name, []) for name in ("hsplitlora", "splitlora")
}
FIXED = ["planning.ranks=fixed", "planning.split=fixed"]
UNEQUAL_RANKS = [f"devices.d{n}.r={r}" for n, r in enumerate((1, 2, 4, 8, 16), start=1)]


class Sweep(NamedTuple):
    """A comparison for each value of a key."""

    title: str
    about: str
    experiment: Experiment
    key: str
    overrides: dict[str, Any]
    picture: str


SWEEPS = {
    "skew": Sweep(
        "Skewed data",
        "Banking77 (20 intents) on stories260K with a new head, five devices, labels dealt out "
        "with Dirichlet(alpha), 20 rounds of 5 steps.",
        Experiment(
            "banking",
            "stories",
            METHODS | {SLOWED: ("hsplitlora", [SLOWER])},
            rates=(1e-2, 1.4e-2),
            rounds=20,
        ),
        "simulation.alpha=0.1,0.5,5",
        {"compare.labels": "device"},
        "sweep-alpha",
    ),
    "devices": Sweep(
        "Number of devices",
        "E2E on stories260K, dealt out by length with Dirichlet(0.5); each round draws 10 of the "
        "devices (3 of 3), 8 rounds of 5 steps, 1,000 pairs held out. One rate for all, found "
        "by searches for both methods with 3 devices and for hsplitlora with 10.",
        Experiment("e2e", "stories", METHODS, rates=(2e-2,), rounds=8, dev="more", searches=False),
        "simulation.num_devices=3,10,30,100",
        {"compare.labels": "device", "devices_per_round": 10},
        "sweep-num_devices",
    ),
    "local-steps": Sweep(
        "Local steps between aggregations",
        "E2E on stories260K, five devices, dealt out by length with Dirichlet(0.5), 40 steps of "
        "each device in all, 1,000 pairs held out. One seed, one rate for all, as above.",
        Experiment(
            "e2e",
            "stories",
            METHODS,
            seeds=(0,),
            rates=(2e-2,),
            rounds=8,
            dev="more",
            searches=False,
        ),
        "steps_per_round=1,5,20",
        {"compare.labels": "device", "compare.steps": 40, "evaluation.every_rounds": 40},
        "sweep-steps_per_round",
    ),
    "rules": Sweep(
        "Rules with equal cuts and ranks",
        "As in skewed data with alpha 0.5, but every device cut at 3 of 5 blocks with rank 8 on "
        "all weights, three rates.",
        Experiment(
            "banking",
            "stories",
            {"equal cuts": (None, [*FIXED, "default.split=3", *ROOMY])},
            rates=(5e-3, 1e-2, 2e-2),
            rounds=20,
            searches=False,
        ),
        "aggregation=fedex,exact,stack,fedavg",
        {"compare.labels": "device"},
        "sweep-aggregation",
    ),
    "energy": Sweep(
        "Energy of dW by rank",
        "Banking77 (20 intents) on stories260K with a new head, whole model on each of five "
        "devices of ranks 1, 2, 4, 8 and 16, labels dealt out with Dirichlet(0.5), 20 rounds of 5 "
        "steps, one seed, one rate for all.",
        Experiment(
            "banking",
            "stories",
            {"ranks 1 to 16": (None, ["default.split=all", *UNEQUAL_RANKS, *ROOMY])},
            seeds=(0,),
            rates=(1e-2,),
            rounds=20,
            searches=False,
        ),
        "aggregation=fedex,exact,svd,zeropad,stack",
        {"compare.labels": "device", "evaluation.rank_energy": True, "planning.ranks": "fixed"},
        "rank-energy",
    ),
}


def run(name: str, out: Path, *, smoke: bool) -> None:
    """Run what is missing of a sweep."""
    sweep = SWEEPS[name]
    file = out / f"{name}.json"
    config = make_config(sweep.experiment, out / "data", smoke=smoke)
    config["compare"]["presets"] = list(sweep.experiment.methods)
    for dotted, value in sweep.overrides.items():
        _set(config, dotted, value)
    set_budgets(config, file)
    code = coordinator(["compare", str(file), "--sweep", sweep.key, "--out", str(out / name)])
    if code:
        raise SystemExit(code)


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *above, last = dotted.split(".")
    for key in above:
        config = config.setdefault(key, {})
    config[last] = value


def write_report(out: Path, options: argparse.Namespace) -> None:
    """Write every sweep that has run to its end."""
    parts = [header("Sweeps", options)]
    for name, sweep in SWEEPS.items():
        if not (out / name / "sweep.md").is_file():
            continue
        command = f"`coordinator compare {name}.json --sweep {sweep.key}`"
        parts += [f"## {sweep.title}", f"{sweep.about} {command}"]
        parts += [(out / name / "sweep.md").read_text(encoding="utf-8").strip()]
        keep(name, (out / name / f"{sweep.picture}.svg").read_bytes())
    save("sweeps", "\n\n".join(parts))


def main() -> None:
    """Run what is missing; report what is there."""
    parser = kept_parser(__doc__, "sweeps", SWEEPS)
    parser.add_argument("--smoke", action="store_true", help="look whether all works")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.ERROR)  # texts without an end are meant
    if not options.report:
        write_data(options.out / "data", smoke=options.smoke)
        for name in options.only or SWEEPS:
            run(name, options.out, smoke=options.smoke)
    if not options.smoke:
        write_report(options.out, options)


if __name__ == "__main__":
    main()
