"""What actors on Ray gain and cost: waves of one process beside those of replicas and of stages.

    python benchmarks/ray_engine.py [--waves 8]

A model of 9 blocks with random weights, of which devices have the first; waves of eight devices,
labels on the coordinator, each device's hidden states 1 MB (8 MB a wave). One thread per engine:
`local` in this process, then actors of one CPU: 1 x 1 (what Ray costs), 2 replicas, 2 stages.
Engines take turns, wave by wave, so that all of them see the same machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch
from report import header, save, table
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.config.engine import EngineConfig
from coordinator.config.run import ServeConfig
from coordinator.engine.interface import Engine, EngineSpec, Job
from coordinator.engine.local import make_local
from coordinator.engine.ray.engine import ray_engines
from edge_sdk.lora.adapters import initial_pair
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.weights import ModelSource

WIDTH, BLOCKS, VOCAB = 512, 9, 2048
DEVICES, ROWS, LENGTH = 8, 4, 128  # 4 x 128 x 512 numbers of 4 bytes: 1 MB a device
SHAPES = {"1 x 1": (1, 1), "2 replicas": (2, 1), "2 stages": (1, 2)}
TARGETS = {"1 x 1": "at most 1.10 x the time", "2 replicas": ">= 1.7 x", "2 stages": ">= 1.7 x"}


def save_model(folder: Path) -> None:
    """Write a Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_spec(folder: Path, engine: EngineConfig) -> EngineSpec:
    """Return what an engine is made of that has all blocks but the first."""
    config = ServeConfig(
        model=str(folder),
        labels="server",
        lora=LoraConfig(r=16),
        engine=engine,
        device="cpu",
    )
    source = ModelSource(config.model, config.task)
    layout = source.layout
    targets = find_targets(source.config, config.task, layout, config.lora)
    ranks = {name: 16 for name in targets if (layout.block_of(name) or 0) >= 1}
    parts = (*(f"block.{i}" for i in range(1, BLOCKS)), "tail")
    return EngineSpec(config, source, parts, 1, ranks)


def begin(engine: Engine, spec: EngineSpec) -> None:
    """Give an engine its factors."""
    targets = find_targets(spec.source.config, "causal-lm", spec.source.layout, spec.config.lora)
    engine.begin({n: initial_pair(n, rank, targets[n], 0) for n, rank in spec.ranks.items()})


def make_jobs() -> list[Job]:
    """Return a wave of devices that are all alike."""
    generator = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    return [
        Job(
            f"device-{i}",
            1,
            float(ROWS),
            ROWS * (LENGTH - 1),
            generator.normal(size=(*shape, WIDTH)).astype(np.float32),
            np.full(ROWS, LENGTH, np.int32),
            generator.integers(0, VOCAB, shape).astype(np.int32),
        )
        for i in range(DEVICES)
    ]


def measure(engines: dict[str, Engine], waves: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return the seconds of each wave and of each update, engines in turn; the first is not one."""
    jobs, found = make_jobs(), {name: (list[float](), list[float]()) for name in engines}
    for step in range(waves + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.train(jobs, step, 0)
            middle = time.perf_counter()
            engine.finish_step(step)
            if step:
                found[name][0].append(middle - start)
                found[name][1].append(time.perf_counter() - middle)
    return found


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waves", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "model"
        save_model(folder)
        spec = make_spec(folder, EngineConfig())
        engines: dict[str, Engine] = {"local": make_local(spec)}
        # Room for all of them at once, of which one at a time computes.
        share = 0.2
        for shape, (replicas, stages) in SHAPES.items():
            config = EngineConfig(
                kind="ray", replicas=replicas, stages=stages, cpus_per_actor=share
            )
            own = make_spec(folder, config)
            make = stack.enter_context(ray_engines(own.config))
            engines[shape] = make(own)
        for engine in engines.values():
            begin(engine, spec)
        found = measure(engines, options.waves)
    local = median(found["local"][0])
    rows = [
        [
            shape,
            f"{1000 * median(times):.0f}",
            f"{1000 * min(times):.0f} to {1000 * max(times):.0f}",
            f"{1000 * median(updates):.0f}",
            f"{local / median(times):.2f}",
            TARGETS.get(shape, ""),
        ]
        for shape, (times, updates) in found.items()
    ]
    titles = ["engine", "wave, ms", "range", "update, ms", "speed by `local`", "target"]
    title = "Actors on Ray beside one process, one thread each"
    save("ray-engine", f"{header(title, options)}\n\n{table(titles, rows)}\n")


if __name__ == "__main__":
    main()
