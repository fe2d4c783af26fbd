"""Seconds that plans of a fleet take, between two rounds and when devices join.

    python benchmarks/planning.py [--devices 10 100 ...] [--before COMMIT] [--most_before 300]

Devices of a 1.1B model (22 blocks, 154 adapted weights), each with memory, speed and link of its
own around those of its board. `plan` is one whole plan (ARMSC), `round` what the end of a round
asks for when importance has moved: reasons, a new plan, its gain, and everybody's part of it.
`join` is what one more device costs that comes between two rounds; `together` what nine tenths of
the devices cost that come at once, in groups that share a plan, beside `one by one`. Seconds are
the processor's. The version before runs in the same process order from a worktree at --before; that
both make the same plans, to the last bit, is checked by a hash of everything in them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from report import header, save, table

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.rules import SERVER
from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.lab.simulation.boards import Scale, catalogue, make_machine, make_profile
from coordinator.planning.joint import plan_all
from coordinator.planning.plan_set import PlanSet
from coordinator.planning.problem import PlanningProblem, ServerProfile
from coordinator.planning.run_planner import Planner
from coordinator.rounds.plans.changes import MOST_AT_ONCE
from edge_sdk.errors import RefusedError
from edge_sdk.lora.targets import LoraConfig, ModelFacts, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.shape import model_shape
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile

ROOT = Path(__file__).parents[1]
TARGET_S, TARGET_DEVICES = 1.0, 1000
BOARDS = ("orin-nano-4gb", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-32gb", "xavier-nx-8gb")
LINKS = ("wifi-good", "wifi-poor", "lan-1g")
# How split points and ranks are chosen; what else is set.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "armsc + rngwp": ({"split": "armsc", "ranks": "rngwp"}, {}),
    "armsc + rngwp, codec auto": ({"split": "armsc", "ranks": "rngwp"}, {"codec": "auto"}),
    "armsc + rngwp, 6 ranks": (
        {"split": "armsc", "ranks": "rngwp", "rank_set": (2, 4, 8, 16, 32, 64)},
        {},
    ),
    "armsc + uniform": ({"split": "armsc", "ranks": "uniform"}, {}),
    "memory + rngwp": ({"split": "memory", "ranks": "rngwp"}, {}),
}


@cache
def model() -> tuple[ModelFacts, ModelShape]:
    """Facts and shape of a Llama of 1.1B parameters."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    layout = find_layout(config, "causal-lm")
    facts = ModelFacts(layout, find_targets(config, "causal-lm", layout, LoraConfig()))
    return facts, model_shape(config, "causal-lm", layout)


def fleet(num_devices: int, seed: int = 0) -> dict[str, DeviceProfile]:
    """Profiles of so many devices: each is up to a third more or less than its board."""
    there, rng, found = catalogue(), np.random.default_rng(seed), {}
    for n in range(num_devices):
        board, link = BOARDS[n % len(BOARDS)], LINKS[n % len(LINKS)]
        machine = make_machine(
            there.boards[board], there.links[link], utilisation=0.3, scale=Scale()
        )
        machine = machine.slowed(float(rng.uniform(0.67, 1.5)))
        found[f"device-{n:05}"] = make_profile(
            board,
            there.boards[board],
            machine,
            overhead_bytes=float(rng.integers(400, 800)) * 1e6,
            scale=Scale(),
            memory_bytes=float(rng.uniform(0.3, 0.7)) * there.boards[board].memory_gib * 2**30,
        )
        if n % 2:
            found[f"device-{n:05}"] = replace(
                found[f"device-{n:05}"], base_bytes=2.0, compute_bytes=2.0, linear_bytes=0.5625
            )
    return found


def importance(seed: int) -> dict[str, float]:
    """Importance of every weight, as a round may find it."""
    rng = np.random.default_rng(seed)
    return {name: float(rng.lognormal(0.0, 1.0)) for name in model()[0].targets}


def make_problem(case: str, num_devices: int) -> PlanningProblem:
    """The situation of *case*."""
    facts, shape = model()
    planning, device = CASES[case]
    settings = {"split": 4, "r": 8, "batch_size": 8, "micro_batch": 4, "codec": "bfloat16"}
    return PlanningProblem(
        config=ServeConfig(
            model="m",
            rounds=9,
            planning=PlanningConfig(**planning),
            default=DeviceSettings(**{**settings, **device}),
        ),
        facts=facts,
        model=shape,
        profiles=fleet(num_devices),
        # As much coordinator for each device, however many there are.
        server=ServerProfile(
            memory_bytes=2e10 + 1e10 * num_devices, flops_per_s=1e13 + 2e12 * num_devices
        ),
        length=256,
        importance=importance(0),
    )


def digest(plans: PlanSet) -> str:
    """A hash of everything in *plans*; floats count to the last bit."""
    text = repr(asdict(plans))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor that *work* takes, and what it returns."""
    began_s = time.process_time()
    found = work()
    return time.process_time() - began_s, found


def measure(case: str, num_devices: int, repeats: int) -> dict[str, Any]:
    """Seconds and hashes of one case."""
    plan_s, round_s, join_s, hashes = [], [], [], []
    for _ in range(repeats):
        problem = make_problem(case, num_devices)
        seconds, plans = timed(lambda: plan_all(problem))  # noqa: B023 - called at once
        plan_s.append(seconds)
        planner = planner_of(problem)
        seconds, decided = timed(lambda: end_round(planner))  # noqa: B023 - called at once
        round_s.append(seconds)
        seconds, joined = timed(lambda: join(planner))  # noqa: B023 - called at once
        join_s.append(seconds)
        hashes += [digest(plans), digest(decided), digest(joined)]
    return {
        "together": timed(lambda: newcomers(make_problem(case, num_devices), MOST_AT_ONCE))[0],
        "single": timed(lambda: newcomers(make_problem(case, num_devices), 1))[0],
        "plan": statistics.median(plan_s),
        "round": statistics.median(round_s),
        "join": statistics.median(join_s),
        "hashes": hashes[:3],
    }


def planner_of(problem: PlanningProblem) -> Planner:
    """A run's planner, with plans for everybody in force."""
    planner = Planner(problem.config, problem.facts, problem)
    planner.profiles = dict(problem.profiles)
    planner.begin(problem.profiles)
    return planner


def end_round(planner: Planner) -> PlanSet:
    """What the end of a round asks the planner: other plans, and everybody's part of them."""
    moved = importance(1)
    reports = {name: Report(1, 80, {}, {}, moved) for name in (SERVER, *planner.profiles)}
    planner.round_ended(1, reports, planner.profiles)
    assert planner.plans is not None
    for device in planner.plans.plans:
        plan = planner.plan(device)
        assert plan is not None
        planner.codec(device, plan)
    assert planner.plans is not None
    return planner.plans


def join(planner: Planner) -> PlanSet:
    """What one more device asks the planner."""
    planner.profiled("newcomer", fleet(1, seed=7)["device-00000"])
    planner.plan("newcomer")
    assert planner.plans is not None
    return planner.plans


def newcomers(problem: PlanningProblem, most: int) -> None:
    """What nine tenths of the devices ask the planner that come in groups of at most so many."""
    names = list(problem.profiles)
    first = len(names) // 10
    planner = Planner(problem.config, problem.facts, replace(problem, profiles={}))
    planner.profiles = {name: problem.profiles[name] for name in names[:first]}
    planner.begin(names[:first])
    for at in range(first, len(names), most):
        planner.copy()  # as the desk does, for who asks meanwhile
        group = names[at : at + most]
        for ask in (lambda d: planner.profiled(d, problem.profiles[d]), planner.plan):
            for device in group:
                with suppress(RefusedError):  # too small for any plan
                    ask(device)


def before(commit: str, case: str, num_devices: int, repeats: int) -> dict[str, Any]:
    """The same in a worktree at *commit*."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(tree), commit], check=True, capture_output=True
        )
        try:
            script = tree / "benchmarks/planning.py"
            script.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
            command = [sys.executable, str(script), "--one", case, "--devices", str(num_devices)]
            command += ["--repeats", str(repeats)]
            env = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 100, 300, 1000, 10000])
    parser.add_argument("--before", default="", help="commit of the version before")
    parser.add_argument("--most_before", type=int, default=300, help="devices it is asked to plan")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.devices[0], options.repeats)))
        return
    rows = []
    for case in options.cases:
        for count in options.devices:
            repeats = options.repeats if count <= 1000 else 1
            new = measure(case, count, repeats)
            row = [case, f"{count:,}", *(f"{new[k]:.3f}" for k in ("plan", "round", "join"))]
            row += [f"{new['together']:.1f}", f"{new['single']:.1f}"]
            if options.before and count <= options.most_before:
                old = before(options.before, case, count, 1 if count > 100 else repeats)
                is_same = "the same" if old["hashes"] == new["hashes"] else "OTHERS"
                row += [f"{old['plan']:.3f}", f"{old['plan'] / new['plan']:.0f}", is_same]
            else:
                row += ["-", "-", "-"]
            rows.append(row)
            print(row, file=sys.stderr)
    heads = ["planner", "devices", "plan s", "round s", "join s", "together s"]
    heads += ["one by one s", "plan before s", "ratio", "plans"]
    options.one = None
    text = f"{header('Plans of a fleet', options)}\n\n{table(heads, rows)}\n"
    text += f"\nTarget: a plan of {TARGET_DEVICES:,} devices below {TARGET_S:g} s."
    save("planning", text)


if __name__ == "__main__":
    main()
