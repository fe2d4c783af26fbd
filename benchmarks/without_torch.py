"""What a device without torch costs: step time, memory and installed size, beside torch's.

    python benchmarks/without_torch.py [--repeats 3] [--steps 12] [--sizes] [--large]

GPT-2-small's shape with random weights, blocks 0..2 on the device, 4 x 128 tokens, LoRA r = 8 on
all linear layers, AdamW, one thread. A step is forward, backward and optimizer; every backend runs
in a fresh process, the backends by turns. CPU time is what the process used, and is the fairer one
on a machine with other work. `--sizes` installs the package into fresh environments (needs an
index); `--large` runs a slice above 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from installed import sizes

ROOT = Path(__file__).parents[1]
SPLIT, ROWS, LENGTH, RANK, SKIPPED, SEED = 3, 4, 128, 8, 3, 0
LARGE_SPLIT = 6
MIB = 2**20


def make_config(*, large: bool) -> Any:
    """GPT-2-small's shape; or a Llama whose first six blocks and embedding take 2.5 GB."""
    from transformers import GPT2Config, LlamaConfig

    if not large:
        return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LARGE_SPLIT + 1,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )


def prepare(folder: Path, config: Any, split: int) -> None:
    """Write parts with random weights, the config, and the graphs; returns nothing but files."""
    import torch
    from safetensors.torch import save_file

    from coordinator.onnx_export.export import export_slice
    from coordinator.onnx_export.job import ExportJob
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import build_empty, find_layout

    config.save_pretrained(folder)
    layout = find_layout(config, "causal-lm")
    shapes = {
        n: t.shape for n, t in build_empty(config, "causal-lm", torch.float32).state_dict().items()
    }
    torch.manual_seed(SEED)
    for part in ("front", *(f"block.{i}" for i in range(split))):
        tensors = {n: torch.randn(shapes[n]) * 0.02 for n in layout.part(part)}
        tensors |= {n: torch.ones(shapes[n]) for n in tensors if "norm" in n or "ln_" in n}
        save_file(tensors, folder / f"{part}.safetensors")
    targets = find_targets(config, "causal-lm", layout, LoraConfig())
    held = {
        n: s
        for n, s in targets.items()
        if any(n.startswith(f"{layout.blocks_path}.{i}.") for i in range(split))
    }
    job = ExportJob(
        task="causal-lm",
        num_labels=0,
        split=split,
        tail=False,
        measures=False,
        targets=held,
        dtypes={},
    )
    began = time.process_time()
    graphs = export_slice(config, job, layout)
    (folder / "graphs").write_bytes(graphs.pack())
    sizes = {name: len(model) for name, model in graphs.models.items()}
    facts = {
        "split": split,
        "targets": list(held),
        "seconds": time.process_time() - began,
        "sizes": sizes,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


# ---- one backend, in a process of its own --------------------------------------------------------


def make_runtime(backend: str, folder: Path, facts: dict[str, Any]) -> Any:
    """The slice on one backend, with equal factors."""
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.training import TrainingConfig

    split = facts["split"]
    names = ["front", *(f"block.{i}" for i in range(split))]
    paths = {name: folder / f"{name}.safetensors" for name in names}
    ranks = dict.fromkeys(facts["targets"], RANK)
    plan = Plan(split=split, ranks=ranks, alphas={}, batch_size=ROWS, micro_batch=ROWS)
    settings = (plan, LoraConfig(r=RANK), TrainingConfig(learning_rate=1e-3), 1000)
    if backend.startswith("onnxruntime"):
        from edge_sdk.model.safetensors_files import map_part
        from edge_sdk.runtime.onnx_graphs import read_graphs
        from edge_sdk.runtime.onnx_runtime import OnnxRuntime

        parts = {name: map_part(path) for name, path in paths.items()}
        graphs = read_graphs(folder / "graphs")
        if backend == "onnxruntime-training":
            from edge_sdk.runtime.onnx_gradients import with_own_gradients

            graphs = with_own_gradients(graphs)
        return OnnxRuntime(graphs, parts, *settings, threads=1)
    import torch

    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.weights import load_config, open_part
    from edge_sdk.runtime.torch_runtime import TorchRuntime

    torch.set_num_threads(1)
    config = load_config(folder, 0)
    tensors = {name: open_part(path) for name, path in paths.items()}
    layout = find_layout(config, "causal-lm")
    return TorchRuntime(config, "causal-lm", layout, tensors, *settings, device="cpu")


def measure(backend: str, folder: Path, steps: int, rows: int, length: int) -> dict[str, Any]:
    """Train *steps* steps and return times and memory."""
    import numpy as np

    from edge_sdk.data.batches import MicroBatch
    from edge_sdk.lora.adapters import Pair

    facts = json.loads((folder / "facts.json").read_text())
    runtime = make_runtime(backend, folder, facts)
    draw = np.random.default_rng(SEED)
    new = {}
    for name, pair in sorted(runtime.state.adapters.pairs().items()):
        a, b = (draw.normal(0, 0.02, x.shape).astype(np.float32) for x in pair)
        new[name] = Pair(a, b)
    runtime.state.adapters.load_pairs(new)
    lengths = np.full(rows, length, np.int32)
    lengths[0] -= length // 4
    ids = draw.integers(0, 50000, (rows, length))
    micro = MicroBatch(ids, lengths, ids)
    wall, cpu, norm = [], [], 0.0
    watch = AnonymousPeak()
    for step in range(steps):
        began, used = time.perf_counter(), time.process_time()
        if backend == "torch with recompute":
            hidden = runtime.forward_eval(micro)
            runtime.forward(micro, step, 0)
        else:
            hidden = runtime.forward(micro, step, 0)
        norm = norm or float(np.linalg.norm(hidden))
        runtime.backward(draw.normal(size=hidden.shape).astype(np.float32))
        runtime.step(step)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    memory = {**watch.stop(), "peak": field("VmHWM"), "settled": field("RssAnon")}
    learned = [x for _, pair in sorted(runtime.state.adapters.pairs().items()) for x in pair]
    learned_norm = float(np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in learned)))
    return {"wall": wall, "cpu": cpu, "memory": memory, "hidden": norm, "learned": learned_norm}


class AnonymousPeak:
    """The largest anonymous memory of this process, looked at every 3 ms."""

    def __init__(self) -> None:
        self._peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.003):
            self._peak = max(self._peak, field("RssAnon"))

    def stop(self) -> dict[str, float]:
        """End looking."""
        self._stop.set()
        self._thread.join()
        return {"anonymous": self._peak}


def field(name: str) -> float:
    """One line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


# ---- everything ----------------------------------------------------------------------------------


def role(backend: str, folder: Path, **options: object) -> dict[str, Any]:
    """Run one backend in a process of its own."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, __file__, f"--role={backend}", f"--folder={folder}", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


BACKENDS = ("torch, graph kept", "torch with recompute", "onnxruntime")


def compare(options: argparse.Namespace) -> str:
    """Step time and memory of all backends."""
    from report import table

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, make_config(large=False), SPLIT)
        facts = json.loads((folder / "facts.json").read_text())
        for _ in range(options.repeats):
            for name in BACKENDS:
                found[name].append(role(name, folder, steps=options.steps))
                print(name, found[name][-1]["memory"], file=sys.stderr)

    def middle(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(run) for run in found[name])

    rows = []
    for name in BACKENDS:
        cpu, wall = (
            1e3 * middle(name, lambda run, kind=kind: statistics.median(run[kind][SKIPPED:]))  # type: ignore[misc]
            for kind in ("cpu", "wall")
        )
        peak, anonymous, settled = (
            middle(name, lambda run, kind=kind: run["memory"][kind])  # type: ignore[misc]
            for kind in ("peak", "anonymous", "settled")
        )
        rows.append([name, cpu, wall, peak, anonymous, settled])
    shown = [[row[0], *(f"{value:.0f}" for value in row[1:])] for row in rows]
    ratios = [
        [f"onnxruntime / {row[0]}", *(f"{rows[2][i] / row[i]:.2f}" for i in range(1, 6))]
        for row in rows[:2]
    ]
    same = {name: (runs[0]["hidden"], runs[0]["learned"]) for name, runs in found.items()}
    graphs = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in facts["sizes"].items())
    return "\n\n".join(
        [
            f"Targets: step time at most 1.00 x torch with recompute and 1.40 x torch that keeps "
            f"its graph; peak RSS at most 0.8 x, anonymous at most 0.3 x. Median of "
            f"{options.repeats} processes, each the median of its steps after the first {SKIPPED}.",
            table(
                (
                    "backend",
                    "CPU ms/step",
                    "wall ms/step",
                    "peak RSS MiB",
                    "peak anon. MiB",
                    "anon. after a step MiB",
                ),
                [*shown, *ratios],
            ),  # fmt: skip
            f"Norm of the first hidden state and of the factors after {options.steps} steps: "
            + "; ".join(f"{n} {h:.6g}, {f:.8g}" for n, (h, f) in same.items())
            + ".",
            f"Export: {facts['seconds']:.1f} s of CPU; {graphs}.",
        ]
    )


def large(options: argparse.Namespace) -> str:
    """A slice whose weights exceed 2 GB."""
    from report import table

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, make_config(large=True), LARGE_SPLIT)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        names = ("torch, graph kept", "onnxruntime")
        runs = [role(name, folder, steps=4, rows=1, length=32) for name in names]
    rows = [
        (name, f"{1e3 * run['cpu'][-1]:.0f}", f"{run['memory']['peak']:.0f}",
         f"{run['memory']['anonymous']:.0f}", f"{run['learned']:.8g}")
        for name, run in zip(names, runs, strict=True)
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## A slice above 2 GB\n\nLlama shape, {LARGE_SPLIT} blocks, {size / 1e9:.2f} GB of "
            "float32 weights, 1 x 32 tokens. The weights stay in the files; peak RSS counts the "
            "pages of them that were touched.",
            table(
                (
                    "backend",
                    "CPU ms, last step",
                    "peak RSS MiB",
                    "peak anon. MiB",
                    "norm of the factors after 4 steps",
                ),
                rows,
            ),  # fmt: skip
        ]
    )


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    if options.role:
        shape = (options.steps, options.rows, options.length)
        print(json.dumps(measure(options.role, options.folder, *shape)))
        return
    from report import header, save

    parts = [header("A device without torch", options), compare(options)]
    parts += [large(options)] if options.large else []
    parts += [sizes()] if options.sizes else []
    save("onnx", "\n\n".join(parts))


if __name__ == "__main__":
    main()
