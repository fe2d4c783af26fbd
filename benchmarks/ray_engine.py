"""What actors on Ray gain and cost: waves of one process beside those of replicas and of stages.

    python benchmarks/ray_engine.py [--waves 8]

A model of 9 blocks with random weights, of which devices have the first; waves of eight devices,
labels on the coordinator, each device's hidden states 1 MB (8 MB a wave). One thread per engine:
`local` in a thread of a process of its own, as a coordinator has it, and as undisturbed by the
others' heaps as they are by its; then actors of one CPU: 1 x 1 (what Ray costs), 2 replicas,
2 stages. Engines take turns, wave by wave, so that all of them see the same machine; a wave's time
is that of a coordinator which waits for it. Beside it, the CPU time of all processes together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
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
from profiler.sensors.memory import keep_freed

WIDTH, BLOCKS, VOCAB = 512, 9, 2048
DEVICES, ROWS, LENGTH = 8, 4, 128  # 4 x 128 x 512 numbers of 4 bytes: 1 MB a device
SHAPES = {"1 x 1": (1, 1), "2 replicas": (2, 1), "2 stages": (1, 2)}
UNCOUNTED = 2  # waves of each engine, until it has the memory that it needs
MAIN = "RAY_ENGINE_MAIN"  # environment: the process that has started all others
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


class Times(NamedTuple):
    """What a step of one wave has taken, in seconds."""

    wave: float
    update: float
    cpu: float
    """CPU time of all processes during the wave."""


def timed(engine: Engine, jobs: list[Job], step: int) -> Times:
    """Measure one step of an engine."""
    before, start = cpu_s(), time.perf_counter()
    engine.train(jobs, step, 0)
    middle, after = time.perf_counter(), cpu_s()
    engine.finish_step(step)
    return Times(middle - start, time.perf_counter() - middle, after - before)


def cpu_s() -> float:
    """Return the CPU time of this program so far, with the processes that it has started."""
    main = psutil.Process(int(os.environ[MAIN]))
    times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
    return sum(own.user + own.system for own in times)


def serve_local(folder: Path, pipe: Connection) -> None:
    """Be a coordinator with the engine `local`: a step for each number that comes."""
    torch.set_num_threads(1)
    keep_freed()
    spec = make_spec(folder, EngineConfig())
    engine, jobs = make_local(spec), make_jobs()
    begin(engine, spec)
    pipe.send(None)
    with ThreadPoolExecutor(1) as thread:
        while (step := pipe.recv()) is not None:
            pipe.send(thread.submit(timed, engine, jobs, step).result())


@contextmanager
def local_steps(folder: Path) -> Iterator[Callable[[int], Times]]:
    """Have what does a step in another process without Ray."""
    context = multiprocessing.get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=serve_local, args=(folder, its))
    process.start()
    pipe.recv()

    def step(number: int) -> Times:
        pipe.send(number)
        found: Times = pipe.recv()
        return found

    try:
        yield step
    finally:
        pipe.send(None)
        process.join()


def measure(folder: Path, waves: int) -> dict[str, list[Times]]:
    """Return what steps take, engines in turn, after some that are not counted."""
    jobs = make_jobs()
    with ExitStack() as stack:
        steps = {"local": stack.enter_context(local_steps(folder))}
        # Room for all of them at once, of which one at a time computes.
        share = 0.2
        for shape, (replicas, stages) in SHAPES.items():
            config = EngineConfig(
                kind="ray", replicas=replicas, stages=stages, cpus_per_actor=share
            )
            spec = make_spec(folder, config)
            engine = stack.enter_context(ray_engines(spec.config))(spec)
            begin(engine, spec)
            steps[shape] = partial(timed, engine, jobs)
        found: dict[str, list[Times]] = {name: [] for name in steps}
        for number in range(UNCOUNTED + waves):
            for name, step in steps.items():
                times = step(number)
                found[name] += [times] * (number >= UNCOUNTED)
    return found


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waves", type=int, default=8)
    options = parser.parse_args()
    os.environ[MAIN] = str(os.getpid())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(folder)
        found = measure(folder, options.waves)
    local = median(times.wave for times in found["local"])
    rows = [
        [
            shape,
            f"{1000 * median(t.wave for t in times):.0f}",
            f"{1000 * min(t.wave for t in times):.0f} to {1000 * max(t.wave for t in times):.0f}",
            f"{1000 * median(t.cpu for t in times):.0f}",
            f"{1000 * median(t.update for t in times):.0f}",
            f"{local / median(t.wave for t in times):.2f}",
            TARGETS.get(shape, ""),
        ]
        for shape, times in found.items()
    ]
    titles = ["engine", "wave, ms", "range", "CPU, ms", "update, ms", "speed by `local`", "target"]
    title = "Actors on Ray beside one process, one thread each"
    save("ray-engine", f"{header(title, options)}\n\n{table(titles, rows)}\n")


if __name__ == "__main__":
    main()
