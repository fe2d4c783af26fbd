"""What it costs a device to look at graphs and templates that somebody else has written.

    python benchmarks/untrusted.py
    python benchmarks/untrusted.py --chats 20000

Graphs: reading and following all of a model's graphs, once for each plan. Templates: tokens of
chats with the template in this process and in one of its own, and without the second rendering by
which what is learned is known to be the assistant's. The model is that in examples/base; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from coordinator.onnx_export.export import export_slice
from coordinator.onnx_export.job import ExportJob
from edge_sdk.data import chats
from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.weights import load_config
from edge_sdk.runtime.onnx_graphs import read_graphs
from edge_sdk.runtime.onnx_sizes import Sizes, check_room

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "base"
TEMPLATE = ROOT / "tests" / "data" / "templates" / "chatml.jinja"
TIMES = 5


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of *work*."""
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def graphs() -> None:
    """Time the look at the graphs of a whole model."""
    config = load_config(BASE, 0)
    layout = find_layout(config, "causal-lm")
    targets = find_targets(config, "causal-lm", layout, LoraConfig())
    job = ExportJob(
        task="causal-lm",
        num_labels=0,
        split=layout.num_blocks,
        tail=True,
        measures=True,
        targets={name: tuple(shape)[:2] for name, shape in targets.items()},
        dtypes={},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.safetensors"
        path.write_bytes(export_slice(config, job, layout).pack())
        read = seconds(lambda: read_graphs(path))
        programs = read_graphs(path).programs()
        sizes = Sizes(B=8, T=256, N=128, R=8)
        followed = seconds(lambda: check_room(programs, sizes, 8e9))
        print(f"graphs: {len(programs)} of {path.stat().st_size / 1e3:.0f} kB in all")
        print(f"  read by our rules   {1e3 * read:7.1f} ms")
        print(f"  sizes followed      {1e3 * followed:7.1f} ms")


def templates(count: int) -> None:
    """Time the tokens of chats."""
    tokenizer: Any = PlainTokenizer(BASE)
    tokenizer.chat_template = TEMPLATE.read_text("utf-8")
    turns = [("user", "What is {0} and {1}? " * 5), ("assistant", "It is {1}. " * 10)] * 2
    rows = load_rows(
        [
            {"messages": [{"role": role, "content": text.format(i, i + 1)} for role, text in turns]}
            for i in range(count)
        ],
        DataConfig(),
    )
    limits = ModelLimits(vocab_size=len(tokenizer))

    def tokens(**how: bool) -> float:
        return seconds(lambda: tokenize_rows(rows, tokenizer, DataConfig(), limits, **how))

    print(f"templates: {count} chats of {len(turns)} turns")
    print(f"  process of its own  {tokens(isolates=True):7.2f} s")
    print(f"  in this process     {tokens():7.2f} s")
    with mock.patch.object(chats._Writer, "check_roles"):
        print(f"  ... without roles   {tokens():7.2f} s")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=2000, help="rows of the data set")
    graphs()
    templates(parser.parse_args().chats)


if __name__ == "__main__":
    main()
