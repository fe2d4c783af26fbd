"""Fine-tune one model across three device processes, watch it, and compare; see scripts/demo.

Only conducts: data is in shards.py, processes in processes.py, the closing page in results.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from processes import ROOT, SIGNALS, Failed, Processes, call
from results import print_results
from shards import Shards, make_shards

from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError, EdgeError
from edge_sdk.model.weights import load_config, locate
from profiler.sensors.cgroup import allowed_cores

BASE = ROOT / "examples" / "base"
# Says that a folder is ours, to be cleared by the next demo.
MARK = ".edgesplit-demo"
DEVICES = ("device-1", "device-2", "device-3")
RANK = 16


@dataclass(frozen=True)
class Demo:
    """What is run, and where."""

    out: Path
    model: Path
    num_blocks: int
    splits: dict[str, int]
    is_base: bool
    options: argparse.Namespace


def main() -> int:
    """Run the demo and return its exit code."""
    SIGNALS.install()
    try:
        run(options_from(sys.argv[1:]))
    except (Failed, EdgeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return 0


def options_from(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Fine-tune one model across three device processes, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="", metavar="ID_OR_FOLDER", help="default: examples/base")
    add("--data", nargs="+", type=Path, default=[], metavar="PATH", help=DATA_HELP)
    add("--columns", default="", help="ours=theirs, e.g. prompt=mr,completion=ref")
    add("--shards", choices=("contiguous", "iid"), default="contiguous", help="how --data is dealt")
    add("--rounds", type=positive, default=6, help="aggregations")
    add("--steps", type=positive, default=20, help="optimizer steps of a round")
    add("--batch-size", type=positive, default=8, help="sequences of a device's step")
    add("--learning-rate", type=float, default=0.0, help="0: 0.012 for the base, else 5e-4")
    add("--labels", choices=("device", "server"), default="device", help="who sees the labels")
    add(
        "--out", "--keep", type=Path, default=ROOT / "demo-run", metavar="DIR", help="for all files"
    )
    return parser.parse_args(arguments)


DATA_HELP = (
    "JSONL, CSV or Parquet files, or a folder of them: files named dev*, val* or eval* are for "
    "evaluation, test* is left alone; default: sample data about boat trips"
)


def positive(text: str) -> int:
    """Return *text* as a number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(options: argparse.Namespace) -> None:
    """Prepare, train, compare."""
    began = time.monotonic()
    demo = prepare(options)
    shards = make_shards(
        demo.out / "data", options.data, options.columns, len(DEVICES), options.shards, demo.is_base
    )
    say(f"model: {demo.model} ({demo.num_blocks} blocks)")
    for name, size in zip(DEVICES, shards.sizes, strict=True):
        say(f"{name}: the first {demo.splits[name]} blocks, {size} private samples")
    seen = "are not sent" if options.labels == "device" else "are sent to the coordinator"
    say(f"the rest runs on the coordinator; labels: {options.labels} (they {seen})")
    make_keys(demo)
    write_configs(demo, shards)
    train(demo)
    trained_s = time.monotonic() - began
    say(f"trained in {trained_s:.0f} s; for comparison, the whole model in one process ...")
    what = ("--folder", str(demo.out), "--model", str(demo.model), "--task", shards.task)
    memory = call("memory.py", demo.out / "memory.log", *what)
    print_results(demo.out, demo.model, shards, demo.splits, memory)
    say(f"{time.monotonic() - began:.0f} s in all; keys, configs, logs and run: {shown(demo.out)}")


def prepare(options: argparse.Namespace) -> Demo:
    """Find the model and make an empty folder."""
    model = locate(options.model or str(BASE))
    num_blocks = int(load_config(model, 0).get_text_config().num_hidden_layers)
    out: Path = options.out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / MARK).exists():
            raise ConfigError(f"--out {out} is not empty and not from a demo; choose another")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    is_base = model.resolve() == BASE.resolve()
    options.learning_rate = options.learning_rate or (1.2e-2 if is_base else 5e-4)
    depths = (num_blocks * 2 // 8, num_blocks * 3 // 8, num_blocks * 4 // 8)
    splits = {name: max(1, k) for name, k in zip(DEVICES, depths, strict=True)}
    return Demo(out, model.resolve(), num_blocks, splits, is_base, options)


def make_keys(demo: Demo) -> None:
    """A key pair for everybody, and the devices on the coordinator's list."""
    home = demo.out / "coordinator"
    command("coordinator", "keygen", str(home / "coordinator.key"))
    for name in DEVICES:
        key = demo.out / name / "device.key"
        command("edge-sdk", "keygen", str(key))
        allow_list = ("--allow-list", str(home / "devices.yaml"))
        command("coordinator", "client", "register", name, f"{key}.pub", *allow_list)
    say("keys made, three devices registered")


def command(program: str, *arguments: str) -> None:
    """Run one of our commands, as a person would type it, in this interpreter's process."""
    from coordinator.cli import main as coordinator_main
    from edge_sdk.cli import main as edge_sdk_main

    entry = {"coordinator": coordinator_main, "edge-sdk": edge_sdk_main}[program]
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            code = entry(arguments)
        finally:
            sys.stdout = stdout
    if code:
        raise Failed(f"{program} {' '.join(arguments)} ended with exit code {code}")


def write_configs(demo: Demo, shards: Shards) -> None:
    """The four files that the commands are started with."""
    options = demo.options
    port = free_port()
    run = {
        "model": str(demo.model),
        "task": shards.task,
        "label_names": list(shards.label_names),
        "labels": options.labels,
        "listen": f"tcp://127.0.0.1:{port}",
        "name": "demo",
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "min_devices": len(DEVICES),
        "default": {"batch_size": options.batch_size},
        "devices": {name: {"split": split} for name, split in demo.splits.items()},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK},
        "training": {"learning_rate": options.learning_rate, "warmup_steps": 5},
        "evaluation": {"data": {"path": str(shards.dev), **shards.data}},
    }
    write_yaml(demo.out / "coordinator" / "run.yaml", run)
    for name, path in zip(DEVICES, shards.train, strict=True):
        device = {
            "coordinator": f"tcp://127.0.0.1:{port}",
            "server_key": "../coordinator/coordinator.key.pub",
            "data": {"path": str(path), "validation_fraction": 0.04, **shards.data},
            "cache": "cache",
            "state": "state",
            "secret_key": "device.key",
            "device": "cpu",
            "threads": 1,
        }
        write_yaml(demo.out / name / "device.yaml", device)


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a config file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def free_port() -> int:
    """A port that nobody uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def train(demo: Demo) -> None:
    """One coordinator and three devices, until all of them are done."""
    with Processes() as processes:
        home = demo.out / "coordinator"
        config = ("--config", str(home / "run.yaml"), f"runs={demo.out / 'runs'}")
        # Devices wait while the coordinator computes: it may have all cores, they have one each.
        cores = int(allowed_cores().value or 1)
        processes.start("coordinator", ["coordinator", "serve", *config], home, None, cores)
        for name in DEVICES:
            folder = demo.out / name
            arguments = ["edge-sdk", "run", "--config", str(folder / "device.yaml")]
            processes.start(name, arguments, folder, folder / "log.txt")
        processes.wait()


def say(text: str) -> None:
    """Write a line beside the coordinator's."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def shown(path: Path) -> str:
    """*path* as a person here would write it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
