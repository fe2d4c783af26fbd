"""How well a device's peak memory is predicted: profiler/estimate.py against TorchRuntime.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from memory_device import train

ROOT = Path(__file__).parents[1]
MIB = 2**20
Kind = Literal["float32", "bfloat16", "float16", "int8", "int4", "recompute", "onnxruntime"]
RECOMPUTED: dict[str, Any] = {"recompute": "slice", "onnxruntime": "block"}
PINNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 50256}
_LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and one device's share of it."""

    name: str
    family: str
    settings: dict[str, Any]
    split: int
    targets: tuple[str, ...] = ("all-linear",)
    rank: int = 8
    rows: int = 4
    length: int = 128
    tail: bool = False
    residual: int = 0
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    kind: Kind = "float32"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's files."""

    @property
    def compute(self) -> str:
        """Dtype of matrix products."""
        return self.dtype if self.kind == self.dtype else "float32"


CASES = (
    Case(
        name="GPT-2-small, split 3 of 12, labels: server, 4 x 128, r = 8 everywhere, residual 8",
        family="gpt2",
        settings=_GPT2,
        split=3,
        residual=8,
    ),
    Case(
        name="Llama shape (1024 / 2816, grouped heads), split 6 of 8, 2 x 256, r = 16 everywhere",
        family="llama",
        settings=_LLAMA,
        split=6,
        rank=16,
        rows=2,
        length=256,
    ),
    Case(
        name="BERT shape with its dropout, k = L = 6, classifier, 8 x 128, r = 8 on query, value",
        family="bert",
        settings={"num_hidden_layers": 6, "num_labels": 2},
        split=6,
        targets=("query", "value"),
        rows=8,
        tail=True,
        task="sequence-classification",
    ),
    Case(
        name="GPT-2 shape, k = L = 4, 4 x 128, r = 4 on c_attn",
        family="gpt2",
        settings={**_GPT2, "n_layer": 4},
        split=4,
        targets=("c_attn",),
        rank=4,
        tail=True,
    ),
    Case(
        name="GPT-2 shape, split 2 of 4, labels: device, 4 x 128, r = 4 on c_attn",
        family="gpt2",
        settings={**_GPT2, "n_layer": 4},
        split=2,
        targets=("c_attn",),
        rank=4,
        tail=True,
    ),
    Case(
        name="GPT-2-small, split 2 of 12, 8 x 384, r = 8 everywhere: tensors beyond the heap",
        family="gpt2",
        settings=_GPT2,
        split=2,
        rows=8,
        length=384,
    ),
    Case(
        name="the Llama shape with base and computation in bfloat16",
        family="llama",
        settings=_LLAMA,
        split=6,
        rank=16,
        rows=2,
        length=256,
        kind="bfloat16",
        dtype="bfloat16",
    ),
    *(
        Case(
            name=f"the Llama shape, {text}",
            family="llama",
            settings=_LLAMA,
            split=6,
            rank=16,
            rows=2,
            length=256,
            kind=kind,
        )
        for kind, text in (
            ("int8", "base in int8"),
            ("int4", "base in int4"),
            ("recompute", "recomputed during the backward pass"),
            ("onnxruntime", "on onnxruntime"),
        )
    ),
    *(
        Case(
            name=f"GPT-2-small, split 3, 4 x 128, r = 8: {kind}",
            family="gpt2",
            settings=_GPT2,
            split=3,
            residual=8,
            kind=kind,
        )
        for kind in ("int8", "int4", "recompute", "onnxruntime")
    ),
    # Few tokens: a CPU multiplies float16 very slowly.
    Case(
        name="GPT-2-small, split 3, 1 x 16, base and computation in float16",
        family="gpt2",
        settings=_GPT2,
        split=3,
        rows=1,
        length=16,
        kind="float16",
        dtype="float16",
    ),
    Case(
        name="GPT-2 shape, split 2 of 4, labels: device: onnxruntime",
        family="gpt2",
        settings={**_GPT2, "n_layer": 4},
        split=2,
        targets=("c_attn",),
        rank=4,
        tail=True,
        kind="onnxruntime",
    ),
    Case(
        name="GPT-2-small, split 2 of 12, 8 x 384, r = 8 everywhere: onnxruntime",
        family="gpt2",
        settings=_GPT2,
        split=2,
        rows=8,
        length=384,
        kind="onnxruntime",
    ),
)


def make_model(case: Case, folder: Path) -> None:
    """Write config and parts of a random model, in the dtype of its base."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from edge_sdk.layout import find_layout

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
    from coordinator.export_job import Job
    from coordinator.onnx_export import export_slice
    from edge_sdk.adapters import LoraConfig, find_targets

    targets = find_targets(config, case.task, layout, LoraConfig(target_modules=case.targets))
    job = Job(
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

    from edge_sdk.layout import find_layout
    from edge_sdk.model_shape import model_shape
    from edge_sdk.training import LINEAR_BYTES
    from profiler.estimate import Work, estimate_memory

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
    from edge_sdk.adapters import LoraConfig, find_targets

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
