"""`coordinator experiment run FILE`: a run on real or emulated boards, with a report."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

from coordinator.commands.terminal import say, say_results
from coordinator.lab.experiment.config import load_experiment
from edge_sdk.errors import INTERRUPTED_EXIT_CODE


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


def _run(options: argparse.Namespace) -> int:
    from coordinator.lab.comparison.plots import require_matplotlib

    require_matplotlib()  # before hours of training, not after
    from coordinator.lab.experiment.completed_runs import COMPLETED
    from coordinator.lab.experiment.outcome.report import write_report
    from coordinator.lab.experiment.testbed import run_experiment
    from edge_sdk.command import stopping_on_signals

    config, methods = load_experiment(options.file, options.overrides)
    stop = threading.Event()
    with stopping_on_signals(stop.set):
        ended = run_experiment(config, methods, options.out, say, stop)
    tables = write_report(config, methods, options.out, ended)
    for table in tables:
        say_results(table.title, table.titles, table.texts)
    if tables:
        say(f"\n{options.out / 'report.html'}; the tables also as .md, .csv and .tex beside it")
    if stop.is_set():
        return INTERRUPTED_EXIT_CODE
    return 0 if set(ended.values()) == {COMPLETED} else 1
