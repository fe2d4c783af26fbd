"""What gradient graphs that a device makes itself cost, beside those that it is sent.

    python benchmarks/own_gradients.py [--repeats 3] [--steps 11]

Run `scripts/test-ort` before: it makes .venv-ort, where onnxruntime is its training build. Blocks
0..2 with random weights on a device that cannot import torch, LoRA r = 8 on all linear layers,
AdamW, one thread. A step is forward, backward and optimizer; every form runs in a fresh process,
the forms by turns. CPU time is what the process used, and is the fairer one on a machine with
other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from without_torch import SKIPPED, measure, prepare

ROOT = Path(__file__).parents[1]
TRAINING_PYTHON = ROOT / ".venv-ort" / "bin" / "python"
SPLIT = 3
SHAPES = ((4, 128), (1, 32), (1, 512))
# Form, backend, and whether it runs where onnxruntime is the training build.
FORMS = (
    ("sent, onnxruntime", "onnxruntime", False),
    ("sent, onnxruntime-training", "onnxruntime", True),
    ("own", "onnxruntime-training", True),
)


def configs() -> dict[str, Any]:
    """GPT-2-small's shape, and a Llama of the same width."""
    from transformers import GPT2Config, LlamaConfig

    llama = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {
        "GPT-2": GPT2Config(**dropout, use_cache=False),
        "Llama": LlamaConfig(vocab_size=50257, **llama, **heads, use_cache=False),
    }


def role(options: argparse.Namespace) -> dict[str, Any]:
    """Train on a device without torch."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnxruntime

    shape = (options.steps, options.rows, options.length)
    found = measure(options.role, options.folder, *shape)
    return {**found, "version": onnxruntime.__version__}


def run(form: tuple[str, str, bool], folder: Path, rows: int, length: int, steps: int) -> Any:
    """Run one form in a process of its own."""
    _, backend, is_training = form
    python = str(TRAINING_PYTHON) if is_training else sys.executable
    flags = {"role": backend, "folder": folder, "rows": rows, "length": length, "steps": steps}
    command = [python, __file__, *(f"--{name}={value}" for name, value in flags.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def compare(options: argparse.Namespace) -> str:
    """Step time and memory of every form, for every model and batch."""
    from report import table

    rows: list[list[str]] = []
    ratios: dict[str, float] = {}
    norms: list[str] = []
    for model, config in configs().items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepare(folder, config, SPLIT)
            for shape in SHAPES:
                found: dict[str, list[Any]] = {form[0]: [] for form in FORMS}
                for _ in range(options.repeats):
                    for form in FORMS:
                        found[form[0]].append(run(form, folder, *shape, options.steps))
                what = f"{model}, {shape[0]} x {shape[1]}"
                print(what, file=sys.stderr)
                times = {name: middle(runs, "cpu") for name, runs in found.items()}
                for name, runs in found.items():
                    memory = [
                        statistics.median(one["memory"][kind] for one in runs)
                        for kind in ("peak", "anonymous")
                    ]
                    version = runs[0]["version"]
                    numbers = (times[name], middle(runs, "wall"), *memory)
                    share = times[name] / times[FORMS[1][0]]
                    cells = [what, name, version, *(f"{n:.0f}" for n in numbers), f"{share:.2f}"]
                    rows.append(cells)
                ratios[what] = times["own"] / times[FORMS[1][0]]
                learned = ", ".join(f"{runs[0]['learned']:.7g}" for runs in found.values())
                norms.append(f"{what}: {learned}")
    worst = max(ratios, key=lambda what: ratios[what])
    heads = ("slice", "gradients", "onnxruntime", "CPU ms/step", "wall ms/step", "peak RSS MiB")
    return "\n\n".join(
        [
            f"Median of {options.repeats} processes, each the median of its steps after the first "
            f"{SKIPPED}. The ratio is that of CPU times, over sent graphs on the same "
            "onnxruntime-training.",
            table((*heads, "peak anon. MiB", "ratio"), rows),
            f"Own gradients take {statistics.median(ratios.values()):.2f} times as long in the "
            f"median, {ratios[worst]:.2f} times at worst ({worst}).",
            f"Norm of the factors after {options.steps} steps, by form: " + "; ".join(norms) + ".",
        ]
    )


def middle(runs: list[Any], kind: str) -> float:
    """Milliseconds of a step."""
    return 1e3 * statistics.median(statistics.median(one[kind][SKIPPED:]) for one in runs)


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    options = parser.parse_args()
    if options.role:
        print(json.dumps(role(options)))
        return
    from report import header, save

    save("own-gradients", f"{header('Own gradient graphs', options)}\n\n{compare(options)}")


if __name__ == "__main__":
    main()
