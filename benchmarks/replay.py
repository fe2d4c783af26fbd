"""Frozen blocks that are computed once: bytes, device seconds and NLL of epochs with and without.

    python benchmarks/replay.py [--rows 960] [--epochs 3] [--seeds 0 1 2]

Our base model on E2E: devices whose 4 of 8 blocks are frozen (r: 0) and a coordinator that trains
the rest, r = 8 on all linear layers, the real commands as processes of their own, one thread each,
a round an epoch. Every way sees the same samples in the same steps. Bytes are those of the devices'
sessions, up and down, parts of the model included once; seconds are what a device's steps computed
(its own clock) and what the kernel counted of its process, start-up included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import header, save, table
from startup import SHARED, Watched, command

from coordinator.results.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
DEVICES, SPLIT, BATCH, RANK, DEV_ROWS = 2, 4, 16, 8, 400
# Ways of a run: labels, and what `replay` says.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels: server, computed in each epoch": ("server", {}),
    "labels: server, replayed": ("server", {"when": "auto"}),
    "labels: server, replayed from int8": ("server", {"when": "auto", "dtype": "int8"}),
    "labels: device, computed in each epoch": ("device", {}),
    "labels: device, replayed": ("device", {"when": "always"}),
}


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """Write consecutive rows for each device, and references of the dev file."""
    for name, source, count in (
        *((f"shard-{i}", "trainset", options.rows) for i in range(DEVICES)),
        ("dev", "devset", DEV_ROWS),
    ):
        path = options.shared / "e2e" / f"{source}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        first = int(name.rpartition("-")[2]) * options.rows if name != "dev" else 0
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows[first : first + count]:
                file.write(json.dumps({"prompt": row["mr"], "completion": row["ref"]}) + "\n")


def shell(module: str, *words: str) -> None:
    """Run a command of ours to its end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command(module, *words), check=True, stdout=subprocess.DEVNULL, env=env)


def run(folder: Path, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of a way; returns its numbers."""
    labels, replay = WAYS[way]
    out = Path(tempfile.mkdtemp(dir=folder))
    shell("coordinator.cli", "keygen", str(out / "coordinator.key"))
    for index in range(DEVICES):
        key = out / f"d{index}.key"
        shell("edge_sdk.cli", "keygen", str(key))
        flags = ["--allow-list", str(out / "devices.yaml")]
        shell("coordinator.cli", "client", "register", f"d{index}", f"{key}.pub", *flags)
    config = {
        "model": str(MODEL),
        "listen": f"tcp://127.0.0.1:{options.port}",
        "secret_key": str(out / "coordinator.key"),
        "allow_list": str(out / "devices.yaml"),
        "runs": str(out),
        "name": "run",
        "labels": labels,
        "rounds": options.epochs,
        "steps_per_round": options.rows // BATCH,
        "min_devices": DEVICES,
        "default": {"batch_size": BATCH, "split": SPLIT, "r": 0, "codec": options.codec},
        "lora": {"r": RANK, "lora_alpha": 16},
        "training": {"learning_rate": 2e-3, "warmup_steps": 10, "seed": seed},
        "evaluation": {
            "data": {"path": str(folder / "dev.jsonl"), "append_eos": False},
            "batch_size": 32,
            "on_devices": False,
        },
        "replay": replay,
    }
    (out / "run.json").write_text(json.dumps(config))
    server = Watched(
        command("coordinator.cli", "serve", "--config", str(out / "run.json")),
        ROOT,
        {"listening": "listening at"},
    )
    server.wait_for("listening")
    own = []
    for index in range(DEVICES):
        device = {
            "coordinator": config["listen"],
            "server_key": str(out / "coordinator.key.pub"),
            "secret_key": str(out / f"d{index}.key"),
            "data": {"path": str(folder / f"shard-{index}.jsonl"), "append_eos": False},
            "state": str(out / f"state-{index}"),
            "cache": str(folder / "parts"),
            "threads": 1,
        }
        (out / f"d{index}.json").write_text(json.dumps(device))
        words = command("edge_sdk.cli", "run", "--config", str(out / f"d{index}.json"))
        own.append(Watched(words, ROOT, {}))
    cpu_s = [device.end()["whole"][1] for device in own]
    server.end()
    return {**numbers(RunFolder(out / "run")), "cpu_s": statistics.mean(cpu_s)}


def numbers(run_folder: RunFolder) -> dict[str, Any]:
    """What a run has cost and come to, device numbers in the mean over the devices."""
    metrics, telemetry = run_folder.rows("metrics.jsonl"), run_folder.rows("telemetry.jsonl")
    found: dict[str, Any] = {
        "nll": metrics[-1]["eval"]["loss"],
        "replayed": sum(row.get("replayed", 0) for row in metrics),
        "samples": sum(row.get("samples", 0) for row in metrics),
        "compute_s": [],
        "up": [],
        "down": [],
    }
    before = {"up": 0.0, "down": 0.0}
    for row in telemetry:
        devices = [own for name, own in row["devices"].items() if name.startswith("d")]
        found["compute_s"].append(statistics.mean(own["compute_s"] for own in devices))
        for way in ("up", "down"):
            now = statistics.mean(own[f"bytes_{way}"] for own in devices)
            found[way].append(now - before[way])
            before[way] = now
    return found


def cells(way: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the table: medians over the seeds."""

    def middle(of: Any) -> float:
        return statistics.median(of(run) for run in runs)

    def later(key: str) -> float:
        return middle(lambda run: statistics.mean(run[key][1:]))

    nlls = sorted(run["nll"] for run in runs)
    return (
        way,
        f"{middle(lambda run: run['up'][0]) / 1e6:.2f}",
        f"{later('up') / 1e6:.2f}",
        f"{later('down') / 1e6:.2f}",
        f"{middle(lambda run: sum(run['up']) + sum(run['down'])) / 1e6:.2f}",
        f"{middle(lambda run: run['compute_s'][0]):.2f}",
        f"{later('compute_s'):.3f}",
        f"{middle(lambda run: run['cpu_s']):.1f}",
        f"{middle(lambda run: run['replayed'] / run['samples']):.1%}",
        f"{statistics.mean(nlls):.4f} ({nlls[0]:.4f}-{nlls[-1]:.4f})",
    )


def main() -> None:
    """Run every way with every seed, in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=960, help="of each device; a multiple of 16")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--codec", default="bfloat16")
    parser.add_argument("--port", type=int, default=17395)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with the data sets")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_data(folder, options)
        for seed in options.seeds:
            for way, runs in found.items():
                runs.append(run(folder, way, seed, options))
                print(seed, way, runs[-1], file=sys.stderr, flush=True)
    heads = (
        "way",
        "MB up, epoch 1",
        "MB up, each later",
        "MB down, each later",
        "MB in all",
        "s computed, epoch 1",
        "s computed, each later",
        "CPU s of the process",
        "samples replayed",
        "dev NLL, mean (range)",
    )
    text = (
        f"A device, in the mean of {DEVICES}, median of {len(options.seeds)} seeds: {options.rows} "
        f"samples, {options.epochs} epochs of {options.rows // BATCH} steps of {BATCH}, "
        f"{options.codec} on the wire, split {SPLIT} of 8."
    )
    rows = [cells(way, runs) for way, runs in found.items()]
    save("replay", "\n\n".join([header("Replay", options), text, table(heads, rows)]))


if __name__ == "__main__":
    main()
