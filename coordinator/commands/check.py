"""`coordinator check`: whether a run would start, and whether its model can be trained in pieces.

Everything is looked at before anybody is greeted, and nothing is run: `serve --check` is the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.commands.readiness.devices import Assumed, add_devices, read_devices
from coordinator.commands.readiness.findings import (
    NAME_WIDTH,
    before_the_model,
    exit_code,
    of_the_run,
)
from coordinator.commands.readiness.forecast import Forecast, forecast
from coordinator.config.presets import load_serve_config
from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.doctor.finding import Finding, as_lines, summary
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import Coverage, LoraConfig, coverage, find_targets, stretches
from profiler.profile import DeviceProfile

if TYPE_CHECKING:
    from edge_sdk.model.layout import Layout, Task
    from edge_sdk.model.weights import ModelSource


def add_check(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = (
        "check config, keys, port and data of a run, prove that the pieces of its model compute "
        "what it does, and predict memory, bytes and time"
    )
    check = add_command(commands, "check", text, _check)
    check.add_argument("--config", type=Path, help="YAML file of a run")
    check.add_argument("--model", metavar="FOLDER", help="folder or hub id, without a config")
    check.add_argument("--task", choices=("causal-lm", "sequence-classification"))
    check.add_argument("--preset", metavar="NAME", help="a method; see `coordinator presets list`")
    add_devices(check)
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
    if (options.config is None) == (options.model is None):
        raise ConfigError("check: give either --config FILE or --model FOLDER")
    if options.config is not None:
        run = load_serve_config(options.config, options.overrides, preset=options.preset)
        return check_run(run, read_devices(options), options.task)
    _check_model(options.model, None, options.task or "causal-lm", LoraConfig(), 0, 0)
    return 0


def check_run(config: ServeConfig, assumed: Assumed, task: Task | None = None) -> int:
    """Print what stands in the way of a run, and what it would take; return the exit code."""
    found: list[Finding] = []
    for finding in before_the_model(config):
        found.append(_shown(finding))
    labels, seed = len(config.label_names), config.training.seed
    _check_model(config.model, config.revision, task or config.task, config.lora, labels, seed)
    if config.trained_by == "devices":
        for finding in of_the_run(config, _forecast(config, assumed)):
            found.append(_shown(finding))
    sys.stdout.write(f"\n{summary(found)}\n")
    return exit_code(found)


def _forecast(config: ServeConfig, assumed: Assumed) -> Forecast:
    """Predict the run with the devices that are *assumed*, else those that are named somewhere."""
    from coordinator.planning.joint import plan_all
    from coordinator.planning.problem_files import read_problem

    names = [*config.devices] or [*AllowList(config.allow_list).devices()] or ["device"]
    devices = assumed.devices or {name: DeviceProfile() for name in names}
    problem = read_problem(assumed.settings(config), devices, None)
    return forecast(problem, plan_all(problem))


def _shown(finding: Finding) -> Finding:
    """Print a finding at once, and return it."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    colours = is_terminal and not os.environ.get("NO_COLOR")
    sys.stdout.write(as_lines(finding, NAME_WIDTH, width=width, colours=colours) + "\n")
    sys.stdout.flush()
    return finding


def _check_model(
    model: str, revision: str | None, task: Task, lora: LoraConfig, num_labels: int, seed: int
) -> None:
    """Print how a model can be cut, and prove that its pieces compute what it does."""
    from edge_sdk.model.weights import load_config, locate

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
