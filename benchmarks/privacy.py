"""What a curious coordinator recovers: `coordinator audit-privacy` on our models, all of it.

    python benchmarks/privacy.py [--models base stories260K] [--tokens 1500] [--public-tokens 8000]
        [--searched 64] [--seed 0] [--docs] [--trial]

Texts are those of the E2E set where it is at hand, our boat trips where not; the attacker has
learned from the other half of the sample. All split points, all codecs. `--docs` writes the tables
and the picture of docs/privacy.md as well; `--trial` tries less and writes nothing elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import header, save

from coordinator.lab.privacy.audit import audit
from coordinator.lab.privacy.config import AuditConfig
from coordinator.lab.privacy.picture import draw
from coordinator.lab.privacy.report import AuditReport
from coordinator.lab.privacy.table import advice, facts, markdown, tables
from edge_sdk.data.rows import DataConfig

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("EDGESPLIT_DATA") or ROOT.parent / "shared" / "data")
MODELS = {"base": ROOT / "examples" / "base", "stories260K": SHARED / "stories260K" / "hf"}
PAGE, PICTURE = ROOT / "docs" / "privacy.md", ROOT / "docs" / "privacy.png"
BEGIN, END = "<!-- Numbers: written by benchmarks/privacy.py. -->", "<!-- End of numbers. -->"
ROWS = 400
TRIAL: dict[str, Any] = {"splits": (1, 4), "codecs": ("bfloat16", "int4"), "searched": 24}


def write_sample(folder: Path, seed: int) -> tuple[Path, str]:
    """Prompts and completions, and what they are."""
    path = folder / "sample.jsonl"
    source = SHARED / "e2e" / "devset.csv"
    if not source.is_file():
        command = [sys.executable, str(ROOT / "examples" / "data" / "make_sample.py")]
        arguments = ["--out", str(folder), "--shards", "1", "--pairs", str(3 * ROWS)]
        subprocess.run([*command, *arguments, "--seed", str(seed)], check=True)
        lines = (folder / "shard-0.jsonl").read_text("utf-8").splitlines()[:ROWS]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path, "our boat trips"
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:ROWS]
    lines = [json.dumps({"prompt": rows[i]["mr"], "completion": rows[i]["ref"]}) for i in chosen]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path, "E2E, dev set"


def run(model: str, options: argparse.Namespace) -> tuple[AuditReport, str]:
    """Audit one model; return what was found, and it in Markdown."""
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        path, what = write_sample(Path(scratch), options.seed)
        settings: dict[str, Any] = {
            "model": str(MODELS[model]),
            "data": DataConfig(path=str(path)),
            "tokens": options.tokens,
            "public_tokens": options.public_tokens,
            "searched": options.searched,
            "seed": options.seed,
        }
        settings |= TRIAL if options.trial else {}
        say = lambda text: print(f"{model}: {text}", file=sys.stderr, flush=True)  # noqa: E731
        found = audit(AuditConfig(**settings), say)
    took_s = time.perf_counter() - begin_s
    lines = [f"* {text}" for text in (f"texts: {what}", *facts(found), *advice(found))]
    parts = ["\n".join(lines), *map(markdown, tables(found))]
    print(f"{model}: {took_s:.0f} s", file=sys.stderr)
    return found, f"### {model}\n\n" + "\n\n".join(parts)


def write_page(texts: list[str]) -> None:
    """Put the numbers where docs/privacy.md has its own."""
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    middle = "\n\n".join(texts)
    PAGE.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}", "utf-8")


def main() -> None:
    """Audit every model that is at hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--public-tokens", type=int, default=8000)
    parser.add_argument("--searched", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--trial", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # products are small: threads would wait for each other
    texts = []
    for model in options.models:
        if not MODELS[model].is_dir():
            print(f"{model}: not at hand", file=sys.stderr)
            continue
        found, text = run(model, options)
        texts.append(text)
        if model == "base" and options.docs:
            PICTURE.write_bytes(draw(found).png)
    if options.docs:
        write_page(texts)
    if options.trial:
        print("\n\n".join(texts))
    else:
        save(
            "privacy", "\n\n".join([header("What a curious coordinator recovers", options), *texts])
        )


if __name__ == "__main__":
    main()
