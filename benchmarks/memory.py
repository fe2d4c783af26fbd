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
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
MIB = 2**20
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
    dtype: Literal["float32", "bfloat16"] = "float32"


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
        dtype="bfloat16",
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
    state = factory.from_config(config, dtype=getattr(torch, case.dtype)).state_dict()
    layout = find_layout(config, case.task)
    for part in layout.part_names():
        tensors = {name: state[name].contiguous() for name in layout.part(part)}
        save_file(tensors, folder / f"{part}.safetensors")


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """The estimate of the case's peak, by parts, for both allocators."""
    from transformers import AutoConfig

    from edge_sdk.layout import find_layout
    from edge_sdk.model_shape import model_shape
    from profiler.estimate import Work, estimate_memory

    config = AutoConfig.from_pretrained(folder)
    layout = find_layout(config, case.task)
    model = model_shape(config, case.task, layout)
    width = 2 if case.dtype == "bfloat16" else 4
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


def train(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Be the device: build the slice, train, and say how much memory that took at most."""
    import peft  # noqa: F401 - part of the import floor
    from transformers import AutoConfig, AutoModel  # noqa: F401

    from edge_sdk.adapters import LoraConfig
    from edge_sdk.layout import find_layout
    from edge_sdk.plan import Plan
    from edge_sdk.runtime_torch import TorchRuntime
    from edge_sdk.training import TrainingConfig
    from edge_sdk.weights import open_part
    from profiler.memory import peak_rss, reset_peak_rss, rss

    floor = rss().value or 0
    reset_peak_rss()
    config = AutoConfig.from_pretrained(folder)
    layout = find_layout(config, case.task)
    ranks = find_ranks(case, config, layout)
    names = ["front", *(f"block.{i}" for i in range(case.split)), *(["tail"] * case.tail)]
    rows = {"batch_size": case.rows, "micro_batch": case.rows}
    plan = Plan(split=case.split, ranks=ranks, alphas={}, tail=case.tail, **rows)
    runtime = TorchRuntime(
        config,
        case.task,
        layout,
        {name: open_part(folder / f"{name}.safetensors") for name in names},
        plan,
        LoraConfig(r=case.rank),
        TrainingConfig(),
        steps,
        device="cpu",
        compute=case.dtype,
        base=case.dtype,
    )
    set_residual(runtime, case)
    runtime.begin_round()
    seconds = [train_step(runtime, case, config, layout.num_blocks, i, steps) for i in range(steps)]
    peak = (peak_rss().value or 0) - floor
    return {"peak": peak, "floor": floor, "seconds": statistics.median(seconds)}


def set_residual(runtime: Any, case: Case) -> None:
    """Give every adapted weight a frozen residual, as earlier rounds would have."""
    import numpy as np

    from edge_sdk.factors import Factors

    generator = np.random.default_rng(0)
    residual = {}
    for name, pair in runtime.pairs().items() if case.residual else ():
        outputs, inputs = pair.b_OR.shape[0], pair.a_RI.shape[1]
        b_OS = generator.normal(0, 1e-3, (outputs, case.residual)).astype(np.float32)
        a_SI = generator.normal(0, 1e-3, (case.residual, inputs)).astype(np.float32)
        residual[name] = Factors(b_OS, a_SI)
    runtime.set_residual(residual)


def train_step(
    runtime: Any, case: Case, config: Any, num_blocks: int, step: int, steps: int
) -> float:
    """One step; returns its processor time."""
    import numpy as np

    from edge_sdk.codecs import decode, encode

    began = time.process_time()
    micro, targets = make_micro(case, config.vocab_size, step, steps)
    if case.split == num_blocks:
        runtime.local(micro, targets, step, 0)
    else:
        hidden_BTD = runtime.forward(micro, step, 0)
        sent = encode(hidden_BTD, "bfloat16")
        if case.tail:
            top_BTD = decode(sent, "bfloat16", hidden_BTD.shape)
            _, grad_BTD = runtime.tail(top_BTD, micro, targets)
        else:
            grad_BTD = np.full_like(hidden_BTD, 1e-4)
        coded = encode(grad_BTD, "bfloat16")
        del grad_BTD  # the coordinator's, not the device's
        runtime.backward(decode(coded, "bfloat16", hidden_BTD.shape))
    runtime.step(step)
    return time.process_time() - began


def make_micro(case: Case, vocab_size: int, step: int, steps: int) -> tuple[Any, int]:
    """Rows of tokens that are spread over the vocabulary, the last one padded, and its targets."""
    import numpy as np

    from edge_sdk.runtime import Micro

    tokens = case.rows * case.length
    spread = np.arange(tokens) * steps + step
    ids = (spread * vocab_size // (tokens * steps)).reshape(case.rows, case.length)
    lengths = np.full(case.rows, case.length, np.int32)
    lengths[-1] -= 5
    ids[-1, -5:] = 0
    if case.task == "sequence-classification":
        labels = np.arange(case.rows, dtype=np.int64) % 2
        return Micro(ids, lengths, labels), case.rows
    labels = ids.copy()
    labels[-1, -5:] = -100
    return Micro(ids, lengths, labels), int((labels[:, 1:] != -100).sum())


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
    options = parser.parse_args()
    if options.role == "make":
        make_model(CASES[options.case], options.folder)
        print("{}")
    elif options.role == "predict":
        print(json.dumps(predict(CASES[options.case], options.folder)))
    elif options.role == "train":
        print(json.dumps(train(CASES[options.case], options.folder, options.steps)))
    else:
        from report import save

        save("memory", measure(options))


if __name__ == "__main__":
    main()
