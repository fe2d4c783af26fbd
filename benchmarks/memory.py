"""How well a device's peak memory is predicted: profiler/estimate/memory.py against TorchRuntime.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--repeats 3] [--steps 4]

Models with random weights, built from configs. Each run is a fresh process that opens the parts
of its slice from safetensors files, as a device does, and trains on rows of the full length, one
of them padded; what goes to and comes from the coordinator is coded and decoded for real. Every
step names other tokens, so that in the end all pages of the embeddings were read, as in a long run.
Peak memory is the most resident size of the process less its size after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memory_cases import CASES, Case
from memory_device import train

ROOT = Path(__file__).parents[1]
MIB = 2**20
RECOMPUTED: dict[str, Any] = {"recompute": "slice", "onnxruntime": "block"}
PINNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def make_model(case: Case, folder: Path) -> None:
    """Write config and parts of a random model, in the dtype of its base."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from edge_sdk.model.layout import find_layout

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.family, **case.settings)
    config.use_cache = False
    config.save_pretrained(folder)
    factory: Any = AutoModelForCausalLM
    if case.task == "sequence-classification":
        factory = AutoModelForSequenceClassification
    model = factory.from_config(config, dtype=getattr(torch, case.dtype))
    state, layout = model.state_dict(), find_layout(config, case.task)
    for part in layout.part_names():
        tensors = {name: state[name].contiguous() for name in layout.part(part)}
        save_file(tensors, folder / f"{part}.safetensors")
    facts = {
        "ranks": find_ranks(case, config, layout),
        "num_blocks": layout.num_blocks,
        "vocab_size": config.vocab_size,
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    if case.kind == "onnxruntime":
        write_graphs(case, config, layout, folder)


def write_graphs(case: Case, config: Any, layout: Any, folder: Path) -> None:
    """What the coordinator makes for a device without torch."""
    from coordinator.onnx_export.export import export_slice
    from coordinator.onnx_export.job import ExportJob
    from edge_sdk.lora.targets import LoraConfig, find_targets

    targets = find_targets(config, case.task, layout, LoraConfig(target_modules=case.targets))
    job = ExportJob(
        task=case.task,
        num_labels=0,
        split=case.split,
        tail=case.tail,
        measures=False,
        targets={name: targets[name] for name in find_ranks(case, config, layout)},
        dtypes={},
    )
    (folder / "graphs").write_bytes(export_slice(config, job, layout).pack())


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """The estimate of the case's peak, by parts, for both allocators."""
    from transformers import AutoConfig

    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.precision import LINEAR_BYTES
    from edge_sdk.model.shape import model_shape
    from profiler.estimate.memory import estimate_memory
    from profiler.estimate.sizes import Work

    config = AutoConfig.from_pretrained(folder)
    layout = find_layout(config, case.task)
    model = model_shape(config, case.task, layout)
    width = 2 if case.kind in ("bfloat16", "float16") else 4
    work = Work(
        first=0,
        stop=case.split,
        has_front=True,
        has_tail=case.tail,
        ranks=find_ranks(case, config, layout),
        micro_batch=case.rows,
        length=case.length,
        base_bytes=width,
        compute_bytes=width,
        linear_bytes=LINEAR_BYTES.get(case.kind),  # type: ignore[call-overload]
        recompute=RECOMPUTED.get(case.kind, "none"),
        trains_head=case.tail and case.task == "sequence-classification",
        residual_rank=case.residual,
    )
    estimates = {"glibc": work, "pinned": replace(work, fragmentation=0.0)}
    return {name: asdict(estimate_memory(model, work)) for name, work in estimates.items()}


def find_ranks(case: Case, config: Any, layout: Any) -> dict[str, int]:
    """The adapted weights of the device's blocks."""
    from edge_sdk.lora.targets import LoraConfig, find_targets

    targets = find_targets(config, case.task, layout, LoraConfig(target_modules=case.targets))
    inside = tuple(f"{layout.blocks_path}.{i}." for i in range(case.split))
    return {name: case.rank for name in targets if name.startswith(inside)}


def in_process(role: str, case: int, folder: Path, steps: int, **env: str) -> dict[str, Any]:
    """Run this file as another process in *role* and read its last line."""
    command = [sys.executable, __file__, f"--role={role}", f"--case={case}", f"--folder={folder}"]
    settings = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(
        [*command, f"--steps={steps}"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> str:
    """Run everything and return the report."""
    rows: dict[str, list[list[str]]] = {"glibc": [], "pinned": []}
    for number, case in enumerate(CASES):
        if options.only and not any(word in case.name for word in options.only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            in_process("make", number, folder, 0)
            predicted = in_process("predict", number, folder, 0)
            for allocator, env in (("glibc", {}), ("pinned", PINNED)):
                runs = [
                    in_process("train", number, folder, options.steps, **env)
                    for _ in range(options.repeats)
                ]
                rows[allocator].append(row(case, predicted[allocator], runs))
                print(rows[allocator][-1], file=sys.stderr)
    return report(options, rows)


def row(case: Case, predicted: dict[str, int], runs: list[dict[str, Any]]) -> list[str]:
    """One line: parts, prediction, measurement."""
    own = ("base", "activations", "workspace", "wire", "residual")
    trained = sum(predicted[name] for name in ("adapters", "gradients", "optimizer"))
    parts = [predicted[name] for name in own[:1]] + [trained] + [predicted[n] for n in own[1:]]
    total = sum(predicted.values())
    peaks = [run["peak"] for run in runs]
    peak = statistics.median(peaks)
    spread = f"{min(peaks) / MIB:.0f}-{max(peaks) / MIB:.0f}"
    seconds = statistics.median(run["seconds"] for run in runs)
    shown = [f"{part / MIB:.0f}" for part in (*parts, total, peak)]
    return [case.name, *shown, spread, f"{total / peak:.3f}", f"{seconds:.2f}"]


def report(options: argparse.Namespace, rows: dict[str, list[list[str]]]) -> str:
    """Both tables under a header."""
    from report import header, table

    heads = (
        *("configuration", "base", "trained", "activations", "workspace", "wire", "residual"),
        *("predicted", "measured", "min-max", "predicted / measured", "CPU s/step"),
    )
    return "\n\n".join(
        [
            header("Predicted and measured peak memory of a device", options),
            f"MiB over the import floor (python, torch, transformers, peft), median of "
            f"{options.repeats} fresh processes of {options.steps} steps each, one thread. "
            "Target: predicted within 10 % of measured. `trained` is adapters, gradients and "
            "Adam's moments.",
            "glibc's allocator as it is (`Work.fragmentation` at its default):",
            table(heads, rows["glibc"]),
            "The same with MALLOC_MMAP_THRESHOLD_=131072, which gives every tensor pages of its "
            "own (`fragmentation` = 0): less memory, more time in the kernel:",
            table(heads, rows["pinned"]),
        ]
    )


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="")
    parser.add_argument("--case", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="words of configurations' names")
    options = parser.parse_args()
    if options.role == "make":
        make_model(CASES[options.case], options.folder)
        print("{}")
    elif options.role == "predict":
        print(json.dumps(predict(CASES[options.case], options.folder)))
    elif options.role == "train":
        facts = json.loads((options.folder / "facts.json").read_text())
        print(json.dumps(train(CASES[options.case], options.folder, facts, options.steps)))
    else:
        from report import save

        found = measure(options)
        print(found) if options.only else save("memory", found)


if __name__ == "__main__":
    main()
