"""Four emulated boards, real clock: hsplitlora against splitlora and hetlora, time to target.

    python benchmarks/boards.py [--rounds 8] [--steps 8] [--limit 900] [--waves available]
                                [--out DIR] [--smoke]

Boards are processes with limits of memory (control groups), CPU time (shares 4 : 3 : 2 : 1, the
strongest has --cores of a core) and link (a relay; one board is behind `4g-good`). The sum of all
shares, the coordinator's one thread and the relays must fit the machine, or its clock is not that
of boards.
Needs the rights to make control groups. Our base model, sample texts sorted by meaning, so that
shards differ; the seed is one. Runs in --out that are complete are not run again, except with other
options.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from report import header, save

ROOT = Path(__file__).parents[1]
GIB = 2**30
# Peak in arbitrary units, memory in GiB, link. torch alone takes 0.4 GiB.
BOARDS = {
    "strong": (4.0, 1.6, "lan-1g"),
    "middle": (3.0, 1.3, "wifi-good"),
    "remote": (2.0, 1.0, "4g-good"),
    "weak": (1.0, 0.8, "wifi-good"),
}
RANKS = {"strong": 8, "middle": 8, "remote": 4, "weak": 2}
WATTS = 15.0
DATA_ROWS = 4000


def write_data(folder: Path) -> None:
    """One shard a board, by meaning, and a dev file."""
    script = ROOT / "examples" / "data" / "make_sample.py"
    words = ["--out", str(folder), "--shards", str(len(BOARDS)), "--pairs", str(DATA_ROWS)]
    subprocess.run([sys.executable, str(script), *words], check=True, stdout=subprocess.DEVNULL)


def make_config(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """What `coordinator experiment run` reads."""
    files = [str(data / f"shard-{number}.jsonl") for number in range(len(BOARDS))]
    boards = {
        name: {"emulated": name, "link": link, "memory_bytes": gib * GIB, "data": file}
        for (name, (_, gib, link)), file in zip(BOARDS.items(), files, strict=True)
    }
    sheets = {
        name: {"memory_gib": gib, "tflops": peak, "watts": WATTS * peak}
        for name, (peak, gib, _) in BOARDS.items()
    }
    how = {"too_long": "cut", "append_eos": False}
    return {
        "model": str(ROOT / "examples" / "base"),
        "max_length": 128,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "waves": options.waves,
        "default": {
            "batch_size": 64,
            "micro_batch": 2,
            "in_flight": 4,
            "codec": "bfloat16",
        },
        "devices": {name: {"r": rank} for name, rank in RANKS.items()},
        "lora": {"r": 8, "lora_alpha": 16},
        "planning": {"rank_set": [2, 4, 8]},
        "training": {"optimizer": "adamw", "learning_rate": options.rate},
        "evaluation": {
            "data": {"path": str(data / "dev.jsonl"), "limit": 48, **how},
            "on_devices": False,
            "every_rounds": 2,
        },
        "device": "cpu",
        "boards": boards,
        "experiment": {
            "presets": list(options.methods),
            "limit_s": options.limit,
            # Labels as SplitLoRA has them; ranks and cuts are the methods' own.
            "methods": {
                "hsplitlora": {
                    "preset": "hsplitlora",
                    "settings": ["labels=server", *(f"devices.{n}.r=null" for n in BOARDS)],
                },
                "splitlora": {
                    "preset": "splitlora",
                    "settings": [
                        "default.split=2",
                        "default.r=4",
                        "server_rank=4",
                        *(f"devices.{n}.r=4" for n in BOARDS),
                    ],
                },
                # Its rounds are long, and its coordinator has nothing else to do.
                "hetlora": {"preset": "hetlora", "settings": ["evaluation.every_rounds=1"]},
            },
            "data": how,
            "cores": options.cores,
            "boards": sheets,
        },
    }


def report(options: argparse.Namespace, out: Path, table: str) -> str:
    """The page: how, the table, the busiest resource of each run."""
    if not table:
        return "No run has begun.\n"
    lines = [header("Four emulated boards", options), "", table, ""]
    for run in json.loads((out / "results.json").read_text(encoding="utf-8")):
        shares = sorted(run["shares"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares[:4])
        killed = sum(board["killed_for_memory"] for board in run["boards"])
        lines.append(
            f"* {run['label']}: {run['outcome']}; busy: {shown}; ended by memory limits: {killed}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--cores", type=float, default=0.3, help="of the strongest board")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of a run, then stopped")
    parser.add_argument("--methods", nargs="+", default=["hsplitlora", "splitlora", "hetlora"])
    parser.add_argument("--waves", choices=["gathered", "available"], default="available")
    parser.add_argument("--out", type=Path, default=Path("boards"))
    parser.add_argument("--smoke", action="store_true", help="two rounds of two steps")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps = 2, 2
    from coordinator.lab.experiment.config import load_experiment
    from coordinator.lab.experiment.outcome.report import write_report
    from coordinator.lab.experiment.testbed import run_experiment
    from edge_sdk.command import stopping_on_signals

    options.out.mkdir(parents=True, exist_ok=True)
    data = (options.out / "data").resolve()
    if not data.is_dir():
        write_data(data)
    file = options.out / "config.json"
    file.write_text(json.dumps(make_config(options, data), indent=1), encoding="utf-8")
    config, methods = load_experiment(file, env={})
    began_s, stop = time.monotonic(), threading.Event()

    def told(text: str) -> None:
        print(f"{time.monotonic() - began_s:7.1f} s  {text}", flush=True)

    with stopping_on_signals(stop.set):
        ended = run_experiment(config, methods, options.out, told, stop)
    tables = write_report(config, methods, options.out, ended)
    text = report(options, options.out, tables[0].markdown() if tables else "")
    print(text)
    if not options.smoke and set(ended.values()) == {"completed"}:
        print(save("boards", text))


if __name__ == "__main__":
    main()
