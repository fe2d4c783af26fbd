"""Everything that a GPU has to show, in one run of bounded time; `scripts/gpu` also runs the tests.

    python benchmarks/gpu.py --out FOLDER [--seconds 300] [--scale gpu|tiny] [--device cuda]

Equality first (split = whole, mixed cuts = each alone, GPU = CPU, resumed = uninterrupted, memory
that runs out), then copies, the board's readings, and tokens a second and peak memory of both sides
against plain PEFT with the same blocks, in the same process one after the other. Weights are drawn
on the GPU; there is no checkpoint and no network. A row is written when it is measured, so that a
run that is cut off loses nothing; what there is no time for is a row that says so.

`--scale tiny` takes the same way with small shapes, also on the CPU: that proves the script, and
measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import gpu_equal as equal
import numpy as np
import torch
from gpu_models import Model, PlainPeft, Shape
from report import commit, cpu, table

from edge_sdk.model import loss as loss_module
from edge_sdk.runtime.transfers import transfers_of
from profiler.sensors.load import gpu_load
from profiler.sensors.memory import peak_rss
from profiler.sensors.power import gpu_power
from profiler.sensors.sources import HERE

MIB = 2**20
# Largest relative differences: of the same numbers in another order; of another machine's kernels;
# of products in 16 bits.
EQUAL_BOUND, KERNEL_BOUND, HALF_BOUND = 1e-4, 1e-3, 5e-2
SERVER_TARGET = 0.9
BASES = ("bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    proof: Shape
    """What equality is shown with."""
    shapes: tuple[Shape, ...]
    rows: int
    """Sequences of a device in a wave."""
    length: int
    warm: int
    """Steps before it is measured."""
    repeats: int
    copied: int
    """Numbers of an array that is copied."""


SCALES = {
    "gpu": Scale(
        proof=Shape("proof", 256, 688, 6, 8, 4, 1024, split=2),
        shapes=(
            Shape("1.1B", 2048, 5632, 22, 32, 4, 32000, split=4),
            Shape("7B", 4096, 11008, 32, 32, 32, 32000, split=4),
        ),
        rows=2,
        length=512,
        warm=3,
        repeats=10,
        copied=8 << 20,
    ),
    "tiny": Scale(
        proof=Shape("proof", 64, 96, 4, 4, 2, 97, split=2),
        shapes=(Shape("tiny", 64, 96, 4, 4, 2, 97, split=1),),
        rows=2,
        length=12,
        warm=1,
        repeats=2,
        copied=1 << 10,
    ),
}
DEVICES = 8


class Report:
    """Rows of a run, written as soon as they are there."""

    def __init__(self, folder: Path, device: torch.device, command: str) -> None:
        self._folder, self._rows = folder, list[dict[str, str]]()
        self.has_failed = False
        self._facts = {
            "command": command,
            "commit": commit() or "unknown",
            "device": _name(device),
            "hardware": f"{cpu()}, {torch.get_num_threads()} threads",
            "software": f"Python {platform.python_version()}, torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
        }
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, **cells: str) -> None:
        """Add a row to a section."""
        self._rows.append({"section": section, **cells})
        print(section, *(f"{name}={cell}" for name, cell in cells.items()), sep="  ", flush=True)
        found = {"facts": self._facts, "rows": self._rows}
        (self._folder / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (self._folder / "gpu.md").write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        parts = ["# On a GPU", "\n".join(f"* {k}: {v}" for k, v in self._facts.items())]
        for section in dict.fromkeys(row["section"] for row in self._rows):
            rows = [row for row in self._rows if row["section"] == section]
            heads = list(dict.fromkeys(n for row in rows for n in row if n != "section"))
            cells = [[row.get(head, "") for head in heads] for row in rows]
            parts += [f"## {section}", table([head.replace("_", " ") for head in heads], cells)]
        return "\n\n".join(parts) + "\n"


class Run:
    """Measurements one after another, as long as there is time."""

    def __init__(self, scale: Scale, device: torch.device, report: Report, seconds: float) -> None:
        self.scale, self.device, self.report = scale, device, report
        self._ends_s = time.monotonic() + seconds

    def do(self, section: str, what: str, needs_s: float, measure: Callable[[], Any]) -> None:
        """Add the row of *measure*, a dict of cells; an error is a row as well."""
        left_s = self._ends_s - time.monotonic()
        if left_s < needs_s:
            self.report.add(section, what=what, found=f"not run: {left_s:.0f} s left")
            return
        began_s = time.monotonic()
        try:
            cells = measure()
        except Exception as error:  # noqa: BLE001 - the others are to be measured
            self.report.has_failed = True
            line = (str(error).strip().splitlines() or [""])[0]
            cells = {"found": f"FAILED: {type(error).__name__}: {line[:150]}"}
        seconds = time.monotonic() - began_s
        self.report.add(section, what=what, **cells, took=f"{seconds:.1f} s")
        del cells
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- equality ----

    def equality(self) -> None:
        """What must be the same numbers."""
        section = "Equality"
        proof = Model(self.scale.proof, self.device, torch.float32)

        def bounded(find: Callable[[], float], bound: float) -> dict[str, str]:
            found = find()
            self.report.has_failed |= not found <= bound
            return {
                "difference": f"{found:.1e}",
                "bound": f"{bound:g}",
                "found": "holds" if found <= bound else "FAILED",
            }

        checks: dict[str, tuple[Callable[[], float], float]] = {
            "split = whole, float32": (partial(equal.split_is_whole, proof), EQUAL_BOUND),
            "mixed cuts = each alone": (partial(equal.mixed_is_alone, proof), EQUAL_BOUND),
            f"{self.device.type} = cpu": (partial(equal.here_is_there, proof), KERNEL_BOUND),
            "resumed = uninterrupted": (partial(equal.resumed_goes_on, proof), EQUAL_BOUND),
        }
        for base in BASES:
            compute = base if base in ("bfloat16", "float16") else "bfloat16"
            find = partial(equal.split_is_whole, proof, compute, base)
            checks[f"split = whole, base {base}, products in {compute}"] = find, HALF_BOUND
        for what, (find, bound) in checks.items():
            self.do(section, what, 10, partial(bounded, find, bound))
        exhausted = partial(equal.exhausted_is_told, proof)
        self.do(section, "memory that runs out is told", 10, lambda: {"found": exhausted()})

    # ---- copies and readings ----

    def copies(self) -> None:
        """How long a thread waits for a copy that is begun behind computation."""
        transfers = transfers_of(self.device)
        array = np.random.default_rng(0).standard_normal(self.scale.copied, np.float32)
        side = 4096 if self.device.type == "cuda" else 64
        work = torch.randn(side, side, device=self.device)
        there = torch.from_numpy(array).to(self.device)

        def waits(copy: Callable[[], Any]) -> float:
            found = []
            for _ in range(self.scale.warm + self.scale.repeats):
                self.wait()
                for _ in range(10):
                    work @ work
                began_s = time.perf_counter()
                copy()
                found.append(time.perf_counter() - began_s)
            return 1000 * median(found[self.scale.warm :])

        def row(beside: Callable[[], Any], plain: Callable[[], Any]) -> dict[str, str]:
            return {
                "MB": f"{array.nbytes / 1e6:.1f}",
                "thread_waits_ms": f"{waits(beside):.3f}",
                "with_a_plain_copy_ms": f"{waits(plain):.3f}",
            }

        def up() -> Any:
            return transfers.upload(array)

        def down() -> Any:
            return transfers.download(there)

        plain = torch.from_numpy(array)
        self.do("Copies", "up, behind work", 10, lambda: row(up, lambda: plain.to(self.device)))
        self.do("Copies", "down, behind work", 10, lambda: row(down, there.cpu))
        same = bool(
            np.array_equal(transfers.download(transfers.upload(array).tensor()).array(), array)
        )
        self.do("Copies", "there and back", 5, lambda: {"found": "same bits" if same else "FAILED"})

    def board(self) -> None:
        """What the board says of itself while it computes."""
        side = 4096 if self.device.type == "cuda" else 64
        work = torch.randn(side, side, device=self.device)
        readings = {"GPU load": gpu_load, "GPU power": gpu_power}
        for what, read in readings.items():

            def cells(read: Any = read) -> dict[str, str]:
                for _ in range(200):
                    work @ work  # on a GPU this is begun, and goes on while it is asked
                reading = read(HERE)
                value = "unknown" if reading.value is None else f"{reading.value:g} {reading.unit}"
                return {"found": f"{value} ({reading.source})"}

            self.do("Board", what, 2, cells)
        memory = HERE.nvml.ask("nvmlDeviceGetMemoryInfo")
        told = (
            "unknown"
            if memory is None
            else f"{memory.used / MIB:.0f} of {memory.total / MIB:.0f} MiB"
        )
        self.do("Board", "memory by NVML", 2, lambda: {"found": told})
        has_liger = find_spec("liger_kernel") is not None
        self.do(
            "Board", "Liger", 1, lambda: {"found": "installed" if has_liger else "not installed"}
        )

    # ---- speed and memory ----

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def steps(self, step: Callable[[], Any]) -> tuple[float, str]:
        """Return seconds of a step, the median, and the most memory that tensors took."""
        for _ in range(self.scale.warm):
            step()
        took = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(self.scale.repeats):
            self.wait()
            began_s = time.perf_counter()
            step()
            self.wait()
            took.append(time.perf_counter() - began_s)
        if self.device.type == "cuda":
            peak = f"{torch.cuda.max_memory_allocated(self.device) / MIB:.0f}"
        else:
            peak = f"process {(peak_rss().value or 0) / MIB:.0f}"
        return median(took), peak

    def speed(self, shape: Shape) -> None:
        """Both sides of a shape against plain PEFT."""
        model = Model(shape, self.device)
        rows, length = self.scale.rows, self.scale.length
        needs_s = 25.0 * shape.blocks * shape.width**2 / (32 * 4096**2) + 5.0
        section = f"{shape.name}, {shape.blocks} blocks"
        plain: dict[str, tuple[float, str]] = {}
        tokens = DEVICES * rows * length

        def server_plain() -> dict[str, str]:
            own = PlainPeft(model, shape.split, shape.blocks)
            jobs = model.jobs([shape.split] * DEVICES, rows, length)
            hidden = np.concatenate([job.hidden_BTD for job in jobs])
            labels = np.concatenate([job.labels for job in jobs if job.labels is not None])
            hidden_BTD, labels_BT = (torch.from_numpy(x).to(self.device) for x in (hidden, labels))
            loss = float(own.train_tail(hidden_BTD, labels_BT))
            plain["server"] = self.steps(lambda: own.train_tail(hidden_BTD, labels_BT))
            return self._cells(tokens, plain["server"]) | {"loss": f"{loss:.4f}"}

        def server(base: str, compute: str) -> dict[str, str]:
            engine = model.engine(shape.split, compute, base)
            jobs = model.jobs([shape.split] * DEVICES, rows, length)
            number = iter(range(1, 1000))

            def step() -> Any:
                at = next(number)
                answers = engine.train(jobs, at, 0)
                engine.finish_step(at)
                return answers

            sums = [answer.sums for answer in step()]
            loss = sum(s.loss_sum for s in sums) / sum(s.num_targets for s in sums)
            cells = self._cells(tokens, self.steps(step), plain.get("server"))
            return cells | {"loss": f"{loss:.4f}", "target": f">= {SERVER_TARGET}"}

        def front_plain() -> dict[str, str]:
            own = PlainPeft(model, 0, shape.split)
            micro = model.micro(rows, length)
            ids_BT = torch.from_numpy(micro.input_ids).to(self.device)
            grad_BTD = torch.full((rows, length, shape.width), 1e-3, device=self.device)
            plain["front"] = self.steps(lambda: own.train_front(ids_BT, grad_BTD))
            return self._cells(rows * length, plain["front"])

        def front(base: str, compute: str) -> dict[str, str]:
            runtime = model.runtime(shape.split, compute, base)
            micro = model.micro(rows, length)
            grad_BTD = np.full((rows, length, shape.width), 1e-3, np.float32)
            number = iter(range(1, 1000))

            def step() -> None:
                at = next(number)
                runtime.forward(micro, at, 0)
                runtime.backward(grad_BTD)
                runtime.step(at)

            return self._cells(rows * length, self.steps(step), plain.get("front"))

        name = f"server part, {shape.blocks - shape.split} blocks, {DEVICES} devices"
        self.do(section, f"{name}: plain PEFT", needs_s, server_plain)
        self.do(section, f"{name}: bfloat16", needs_s, partial(server, "bfloat16", "bfloat16"))
        if find_spec("liger_kernel") is not None:
            known, loss_module._has_liger = loss_module._has_liger, lambda: False  # type: ignore[assignment]
            measure = partial(server, "bfloat16", "bfloat16")
            self.do(section, f"{name}: bfloat16, without Liger", needs_s, measure)
            loss_module._has_liger = known
        for base in ("int8", "int4"):
            self.do(section, f"{name}: {base}", needs_s, partial(server, base, "bfloat16"))
        name = f"device part, {shape.split} blocks"
        self.do(section, f"{name}: plain PEFT", needs_s / 2, front_plain)
        for base in BASES:
            compute = "float16" if base == "float16" else "bfloat16"
            self.do(section, f"{name}: {base}", needs_s / 2, partial(front, base, compute))

    def _cells(
        self, tokens: int, found: tuple[float, str], plain: tuple[float, str] | None = None
    ) -> dict[str, str]:
        """Return the cells of a speed, beside that of plain PEFT."""
        cells = {
            "tokens_a_second": f"{tokens / found[0]:,.0f}",
            "ms_a_step": f"{1000 * found[0]:.1f}",
            "peak_MiB": found[1],
        }
        if plain is not None:
            cells["x_plain_speed"] = f"{plain[0] / found[0]:.2f}"
        return cells


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return "CPU: no GPU was measured"


def main() -> int:
    """Measure; 1 where something that must hold does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.md and gpu.json")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="nothing begins that ends later"
    )
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: there is no CUDA device; `--scale tiny --device cpu` proves the way"
        )
    device = torch.device(options.device)
    command = (
        f"gpu.py --scale {options.scale} --device {options.device} --seconds {options.seconds:g}"
    )
    report = Report(options.out, device, command)
    run = Run(SCALES[options.scale], device, report, options.seconds)
    run.equality()
    run.copies()
    for shape in run.scale.shapes:
        run.speed(shape)
    run.board()
    return int(report.has_failed)


if __name__ == "__main__":
    sys.exit(main())
