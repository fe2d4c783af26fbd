"""`coordinator check`: whether a model can be trained in pieces, before anybody starts a run."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.config.presets import load_serve_config
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import Coverage, LoraConfig, coverage, find_targets, stretches

if TYPE_CHECKING:
    from edge_sdk.model.layout import Layout, Task
    from edge_sdk.model.weights import ModelSource


def add_check(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "show how a model can be split, and prove that its pieces compute what it does"
    check = add_command(commands, "check", text, _check)
    check.add_argument("--config", type=Path, help="YAML file of a run")
    check.add_argument("--model", metavar="FOLDER", help="folder or hub id, without a config")
    check.add_argument("--task", choices=("causal-lm", "sequence-classification"))
    check.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


@dataclass(frozen=True)
class Examined:
    """What is known of a model whose pieces compute what it does."""

    layout: Layout
    coverage: Coverage
    """How much of its blocks has adapters."""


def examine(config: Any, task: Task, lora: LoraConfig) -> Examined:
    """Prove that the model of *config* can be split, on a narrow stand-in of it.

    Raises:
        ModelError: it cannot, or its pieces compute something else; the message says why.
    """
    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.split_check import check_split

    layout = find_layout(config, task)
    check_split(config, task)
    targets = find_targets(config, task, layout, lora)
    return Examined(layout, coverage(config, task, layout, targets))


def cuts_in_words(layout: Layout) -> str:
    """Return how many blocks a device can hold, as `1-30` or `1, 4-8`."""
    return stretches(layout.cuts)


def travels_in_words(layout: Layout) -> str:
    """Return what goes from one party to the next for each token."""
    ids = " and the token ids (`labels: server` only)" if layout.needs_ids else ""
    return f"the hidden state{ids}"


def _check(options: argparse.Namespace) -> int:
    from edge_sdk.model.weights import load_config, locate

    if (options.config is None) == (options.model is None):
        raise ConfigError("check: give either --config FILE or --model FOLDER")
    lora, num_labels, seed, revision = LoraConfig(), 0, 0, None
    model: str = options.model
    task: Task = options.task or "causal-lm"
    if options.config is not None:
        run = load_serve_config(options.config, options.overrides)
        model, task, revision = run.model, options.task or run.task, run.revision
        lora, num_labels, seed = run.lora, len(run.label_names), run.training.seed
    began = time.monotonic()
    folder = locate(model, revision)
    if task == "sequence-classification":
        num_labels = num_labels or load_config(folder, 0).num_labels
    config = load_config(folder, num_labels)
    found = examine(config, task, lora)
    source = _opened(folder, task, num_labels, seed)
    unseen = _check_weights(source, found.layout)
    weights = f"its own weights were not tried: {unseen}" if unseen else "its own weights too"
    took = f"{time.monotonic() - began:.1f} s"
    blocks = f"{found.layout.num_blocks} blocks"
    lines = {
        "model": f"{config.model_type}, {task}, {blocks}",
        "cuts": f"a device can hold {cuts_in_words(found.layout)} of {blocks}",
        "travels": travels_in_words(found.layout),
        "adapters": found.coverage.text.removeprefix("adapters "),
        "split": f"the pieces compute what the whole model does; {weights} ({took})",
    }
    if source is not None:
        lines["hash"] = f"{_hash(source)} (`accept.model_hash` of a device)"
    for name, said in lines.items():
        sys.stdout.write(f"{name:<10}{said}\n")
    return 0


def _opened(folder: Path, task: Task, num_labels: int, seed: int) -> ModelSource | None:
    """Return the model with its weights; None where none lie beside its config."""
    from edge_sdk.model.weights import ModelSource, has_weights

    if not has_weights(folder):
        return None
    source = ModelSource(str(folder), task, num_labels=num_labels)
    source.load_whole(seed)
    return source


def _check_weights(source: ModelSource | None, layout: Layout) -> str:
    """Make sure of the same with the model's own weights; returns why that was not tried."""
    from edge_sdk.model.split_check import check_weights

    if source is None:
        return "none lie beside its config"
    return check_weights(source.config, source.task, layout, source.tensors)


def _hash(source: ModelSource) -> str:
    """Return the hash by which a device knows the model; all of it is read where it is not kept."""
    from edge_sdk.model.kept.part_cache import PartCache
    from edge_sdk.model.kept.part_hashes import PartHashes
    from edge_sdk.model.weights import model_hash

    hashes = PartHashes(source, PartCache().folder)
    return model_hash({name: hashes.describe(name) for name in source.part_names()})
