"""`coordinator experiment run FILE`: a run on real or emulated boards, with a report."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError

if TYPE_CHECKING:
    from coordinator.lab.experiment.config import ExperimentConfig


# Boards are prepared once.
OF_ALL_METHODS = ("boards", "faults", "experiment")


def add_experiment(commands: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Register the command with the parser of `coordinator`."""
    text = "runs on boards behind ssh, or on emulated ones, from one file"
    parser = commands.add_parser("experiment", help=text, description=text)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run_text = "start boards and coordinator, watch them, write a report"
    run = verbs.add_parser("run", help=run_text, description=run_text)
    run.set_defaults(run=_run)
    run.add_argument("file", type=Path, metavar="FILE", help="YAML file; see docs/experiment.md")
    run.add_argument(
        "--out", type=Path, default=Path("experiment"), help="folder; default: %(default)s"
    )
    run.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def load_experiment(
    file: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ
) -> tuple[ExperimentConfig, dict[str, ExperimentConfig]]:
    """Return the experiment that a file describes, and the config of each of its methods.

    Raises:
        ConfigError: as `load_config`; or the file contradicts one of the presets.
    """
    from coordinator.config.presets import load_with_preset
    from coordinator.lab.experiment.config import ExperimentConfig

    config = load_with_preset(ExperimentConfig, file, overrides, env)
    if config.trained_by == "coordinator":
        raise ConfigError("trained_by: an experiment trains on boards; use `coordinator serve`")
    names = config.experiment.presets
    if not names:
        return config, {config.preset or "run": config}
    if config.preset is not None:
        raise ConfigError("preset: name it in experiment.presets instead; remove it")
    methods = {}
    for name in names:
        own = config.experiment.methods.get(name)
        preset, settings = (own.preset, own.settings) if own else (name, ())
        told = [*overrides, *settings]
        methods[name] = load_with_preset(ExperimentConfig, file, told, env, preset=preset)
        if methods[name].trained_by == "coordinator":
            raise ConfigError(f"experiment.presets: {name} trains without boards; remove it")
        for key in OF_ALL_METHODS:
            if getattr(methods[name], key) != getattr(config, key):
                raise ConfigError(
                    f"experiment.methods: {name} changes {key}, which all methods share; change it "
                    "for all of them, or write another experiment"
                )
    return config, methods


def _run(options: argparse.Namespace) -> int:
    from coordinator.lab.comparison.plots import require_matplotlib

    require_matplotlib()  # before hours of training, not after
    from coordinator.lab.experiment.completed_runs import COMPLETED
    from coordinator.lab.experiment.report import write_report
    from coordinator.lab.experiment.testbed import run_experiment
    from edge_sdk.command import stopping_on_signals

    config, methods = load_experiment(options.file, options.overrides)
    stop = threading.Event()
    with stopping_on_signals(stop.set):
        ended = run_experiment(config, methods, options.out, _say, stop)
    if table := write_report(config, methods, options.out, ended):
        _say(f"{table}\n\n{options.out / 'report.html'}")
    if stop.is_set():
        return INTERRUPTED_EXIT_CODE
    return 0 if set(ended.values()) == {COMPLETED} else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
