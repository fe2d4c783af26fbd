"""Peak memory of a coordinator, and the time of its step, by `base`.

    python benchmarks/coordinator_base.py [--gib 2.33] [--bases float32 bfloat16 int8 int4]

Memory: a Llama's shape of --gib GiB of random bfloat16 in a scratch folder. The real `coordinator
serve` as a process of its own, one device beside it, labels on the server: two rounds of one step,
evaluated before the first and after each by a file and by a prompt, tested at the end, its adapter
exported and read back. So the coordinator holds all parts of the model, from the first line to the
last. The kernel is asked for its memory every 4 ms: pages without a file (RssAnon + RssShmem), and
all resident pages (VmHWM), those of mapped files among them.

Time: `LocalEngine` in this process on the last blocks of the same model, a wave of --rows sequences
forward, backward and update; the bases in turn, so that each has the same minutes of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import header, save, table
from startup import ROOT, command, make_large, shell

MIB = 2**20
BASES = ("float32", "bfloat16", "int8", "int4")
COMPUTE = {"bfloat16": "bfloat16", "float16": "float16"}
"""Dtype of products, where float32 cannot be."""
SAMPLE_S = 0.004
LENGTH, BATCH, RANK = 48, 2, 8
TARGET = 1.1
# What a coordinator has imported before it opens a model.
IMPORTS = (
    "import coordinator.rounds.launch, peft, transformers.models.llama.modeling_llama; "
    "from pathlib import Path; print(Path('/proc/self/status').read_text())"
)
TEXTS = [{"text": f"The {n} boats leave at noon from the old harbour."} for n in range(6)]


# ---- memory --------------------------------------------------------------------------------------


def fields(status: str) -> dict[str, float]:
    """MiB of each memory field of a `/proc/PID/status`."""
    lines = (line.split() for line in status.splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}


def anonymous(found: dict[str, float]) -> float:
    """Pages that stand in no file."""
    return found["RssAnon"] + found["RssShmem"]


def imported() -> float:
    """MiB without a file of a process that has imported what a coordinator does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    return anonymous(fields(done.stdout))


def write_run(folder: Path, base: str, port: int) -> None:
    """Write what coordinator and device read."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    run = {
        "model": str(folder / "large"),
        "listen": f"tcp://127.0.0.1:{port}",
        "secret_key": str(folder / "coordinator.key"),
        "allow_list": str(folder / "devices.yaml"),
        "runs": str(folder / "runs"),
        "name": f"run-{base}",
        "labels": "server",
        "rounds": 2,
        "steps_per_round": 1,
        "max_length": LENGTH,
        "patience_s": 600,
        "default": {"batch_size": BATCH, "split": 1},
        "lora": {"r": RANK},
        "base": base,
        "compute": COMPUTE.get(base, "float32"),
        "device": "cpu",
        "evaluation": {
            "data": {"path": str(rows), "limit": BATCH},
            "batch_size": BATCH,
            "on_devices": False,
            "prompts": ["The boat"],
            "max_new_tokens": 2,
            "test_file": str(rows),
        },
    }
    (folder / "run.json").write_text(json.dumps(run))
    device = {
        "coordinator": run["listen"],
        "server_key": str(folder / "coordinator.key.pub"),
        "secret_key": str(folder / "d0.key"),
        "data": {"path": str(rows)},
        "state": str(folder / f"state-{base}"),
        "cache": str(folder / "parts"),
        "threads": 1,
    }
    (folder / "d0.json").write_text(json.dumps(device))


def write_keys(folder: Path) -> None:
    """Make and register the keys of a coordinator and its device."""
    shell("coordinator.cli", "keygen", str(folder / "coordinator.key"))
    shell("edge_sdk.cli", "keygen", str(folder / "d0.key"))
    flags = ["--allow-list", str(folder / "devices.yaml")]
    shell("coordinator.cli", "client", "register", "d0", str(folder / "d0.key.pub"), *flags)


def peaks(folder: Path, base: str) -> dict[str, float]:
    """Most MiB of the coordinator: before it listens, in its rounds, and after them."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / f"{base}.log"
    with log.open("w") as out:
        serve = command("coordinator.cli", "serve", "--config", str(folder / "run.json"))
        server = subprocess.Popen(serve, stdout=out, stderr=out, env=env)
        device: Any = None
        found: dict[str, float] = {"start": 0.0, "rounds": 0.0, "result": 0.0, "resident": 0.0}
        status, began = Path(f"/proc/{server.pid}/status"), time.monotonic()
        done = folder / "runs" / f"run-{base}" / "metrics.jsonl"
        while server.poll() is None and time.monotonic() - began < 1200:
            if device is None and "listening at" in log.read_text():
                run = command("edge_sdk.cli", "run", "--config", str(folder / "d0.json"))
                device = subprocess.Popen(run, stdout=out, stderr=out, env=env)
            is_over = done.is_file() and len(done.read_text().splitlines()) == 3
            phase = "start" if device is None else "result" if is_over else "rounds"
            now = fields(status.read_text())
            if "RssAnon" in now:
                found[phase] = max(found[phase], anonymous(now))
                found["resident"] = max(found["resident"], now["VmHWM"])
            time.sleep(SAMPLE_S)
    if server.returncode:
        raise SystemExit(f"{base}: ended with {server.returncode}\n{log.read_text()[-3000:]}")
    device.wait()
    return found


def predicted(folder: Path, base: str) -> tuple[float, float]:
    """MiB of all parts in a base, and of all else that the estimate knows: adapters and a wave."""
    from coordinator.config.run import ServeConfig
    from coordinator.planning.costs import first_ranks, server_base_bytes, server_rows_bytes
    from coordinator.planning.problem_files import read_problem
    from edge_sdk.config.loader import load_config
    from edge_sdk.model.partition import Slice
    from edge_sdk.model.precision import resolve_compute
    from edge_sdk.model.quantized import resolve_base
    from edge_sdk.model.weights import ModelSource

    config = load_config(ServeConfig, folder / "run.json", [])
    problem = read_problem(config, {}, None)
    last = problem.num_blocks
    ranks = first_ranks(problem, "", 1, last)
    ranks = {name: RANK for name in ranks}
    total = server_base_bytes(problem, 1, ranks) + server_rows_bytes(problem, "device", 1, ranks)
    import torch

    source = ModelSource(config.model, config.task)
    dtype, kind = resolve_base(config.base, resolve_compute(config.compute, torch.device("cpu")))
    slice_ = Slice(source.config, config.task, source.layout, dtype, quantized=kind)
    parts = sum(p.numel() * p.element_size() for p in slice_.model.parameters())
    return parts / MIB, total / MIB - parts / MIB


def memory(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Measure the peaks of one base after the other; yields the table so far."""
    floor = imported()
    rows: list[list[str]] = []
    for base in options.bases:
        write_run(folder, base, options.port)
        parts, wave = predicted(folder, base)
        found = peaks(folder, base)
        shutil.rmtree(folder / "runs")
        most = max(found[phase] for phase in ("start", "rounds", "result")) - floor
        bound = TARGET * parts + wave
        row = [base, f"{parts:.0f}", f"{wave:.0f}"]
        row += [f"{max(0.0, found[phase] - floor):.0f}" for phase in ("start", "rounds", "result")]
        row += [f"{most:.0f}", f"{bound:.0f}", f"{most / bound:.2f}", f"{found['resident']:.0f}"]
        print(*row, file=sys.stderr, flush=True)
        rows.append(row)
        yield _memory_text(floor, rows)


def _memory_text(floor: float, rows: list[list[str]]) -> str:
    heads = (
        "`base`", "all parts", "adapters and wave", "peak before listening", "in its rounds",
        "at its end", "peak", f"{TARGET} x parts + wave", "of that", "resident, files mapped too",
    )  # fmt: skip
    words = (
        f"MiB. A process that has imported what a coordinator does has {floor:.0f} MiB without a "
        "file; peaks are above that, of pages without a file, the last column is all there is. The "
        "wave is the estimate's. With one device no block of the coordinator has a residual of "
        "others: with mixed cuts, 16-bit weights that take one in stand in memory of their own, up "
        "to the size of the parts, where they are mapped here."
    )
    return f"{words}\n\n{table(heads, rows)}"


# ---- time ----------------------------------------------------------------------------------------


def engines(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An engine of the last blocks in each base."""
    from coordinator.config.run import DeviceSettings, ServeConfig
    from coordinator.engine.interface import EngineSpec
    from coordinator.engine.local import make_local
    from edge_sdk.lora.adapters import initial_pair
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.weights import ModelSource

    source = ModelSource(str(folder / "large"), "causal-lm")
    lora = LoraConfig(r=RANK)
    targets = find_targets(source.config, "causal-lm", source.layout, lora)
    last = source.layout.num_blocks
    first = last - options.blocks
    prefixes = tuple(f"{source.layout.blocks_path}.{i}." for i in range(first, last))
    ranks = {name: RANK for name in targets if name.startswith(prefixes)}
    parts = (*(f"block.{i}" for i in range(first, last)), "front", "tail")
    made = {}
    for base in options.bases:
        config = ServeConfig(
            model=str(folder / "large"),
            labels="server",
            base=base,
            compute=COMPUTE.get(base, options.compute),
            device="cpu",
            lora=lora,
            default=DeviceSettings(split=first),
        )
        engine = make_local(EngineSpec(config, source, parts, first, ranks))
        engine.begin({name: initial_pair(name, RANK, targets[name], 0) for name in ranks})
        made[base] = engine
    return made


def speed(folder: Path, options: argparse.Namespace) -> str:
    """Measure the seconds of a step of all bases, in turn."""
    import numpy as np
    import torch

    from coordinator.engine.interface import Job

    made = engines(folder, options)
    draw = np.random.default_rng(0)
    times: dict[str, list[float]] = {base: [] for base in made}
    width = next(iter(made.values())).slice.layout.width
    hidden = draw.normal(size=(options.rows, options.length, width)).astype(np.float32)
    labels = draw.integers(3, 4000, (options.rows, options.length)).astype(np.int64)
    lengths = np.full(options.rows, options.length, np.int32)
    for step in range(options.steps + 1):
        for base, engine in made.items():
            targets = labels.size - options.rows
            job = Job(
                "d", engine.first, options.rows, targets, hidden.copy(), lengths, labels
            )  # fmt: skip
            began = time.perf_counter()
            engine.train([job], step, 0)
            engine.finish_step(step)
            if step:  # the first step allocates
                times[base].append(time.perf_counter() - began)
    medians = {base: statistics.median(own) for base, own in times.items()}
    plain = medians.get("float32", next(iter(medians.values())))
    rows = [
        [base, COMPUTE.get(base, options.compute), f"{medians[base]:.3f}",
         f"{min(own):.3f}-{max(own):.3f}", f"{medians[base] / plain:.2f}"]
        for base, own in times.items()
    ]  # fmt: skip
    words = (
        f"{options.blocks} blocks and the head, {options.rows} x {options.length} tokens, "
        f"{torch.get_num_threads()} thread, median of {options.steps} steps."
    )
    heads = ("`base`", "`compute`", "s a step", "range", "of float32")
    return f"{words}\n\n{table(heads, rows)}"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.33, help="size of the model in bfloat16")
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--part", choices=("memory", "speed", "both"), default="both")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the timed engine")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compute", default="float32", help="of float32, int8 and int4, timed")
    parser.add_argument("--port", type=int, default=17460)
    parser.add_argument("--scratch", default="", help="folder of the model, kept; else a new one")
    options = parser.parse_args()
    kept, options.scratch = options.scratch, ""  # a path of this machine alone
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(kept or scratch)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if not (folder / "large").is_dir():
            folder.mkdir(exist_ok=True)
            make_large(folder / "large", options.gib)
            write_keys(folder)
        timed = [speed(folder, options)] if options.part != "memory" else []
        write(options, timed)
        for text in memory(folder, options) if options.part != "speed" else ():
            write(options, [text, *timed])  # each base as it comes: a run takes minutes


def write(options: argparse.Namespace, texts: list[str]) -> None:
    """Write what is known so far."""
    shown = argparse.Namespace(**{**vars(options), "bases": " ".join(options.bases)})
    texts = [header("Memory and time of a coordinator by its base", shown), *texts]
    save("coordinator-base", "\n\n".join(texts))


if __name__ == "__main__":
    main()
