"""`coordinator export` and `coordinator report`: a run's result, and the run on one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say_import
from coordinator.export.needs import check_options
from coordinator.export.options import DTYPES, FORMATS, ExportOptions
from coordinator.results.lifecycle import read_run
from edge_sdk.errors import ConfigError


def add_export(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "write a run's adapter or model"
    export = add_command(commands, "export", text, _export, run_folder=True)
    add = export.add_argument
    add("--to", type=Path, required=True, help="folder to write")
    add("--format", choices=FORMATS, help="what is written; default: peft")
    add("--merged", action="store_true", help="the same as --format merged")
    add("--max-rank", type=int, metavar="R", help="most ranks of each weight that are kept")
    add("--dtype", choices=DTYPES, help="of a merged model; default: that of the base")
    add("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's folder, for --format gguf")
    add("--push-to-hub", metavar="ID", help="push it to this repository, made private if new")
    add("--public", action="store_true", help="make the new repository public")


def _export(options: argparse.Namespace) -> int:
    wanted = _wanted(options)
    if options.to.exists() and not options.to.is_dir():
        raise ConfigError(f"--to: {options.to} is a file; name a folder")
    if options.to.exists() and any(options.to.iterdir()):
        raise ConfigError(f"{options.to} exists and is not empty; choose another folder")
    check_options(wanted)
    folder, config = read_run(options.folder, [])
    say_import()
    from coordinator.export.run import export_run
    from coordinator.lab.centralised.run import export_pooled

    sys.stderr.write(f"reading model and result of run {folder.name}, writing {options.to}\n")
    export = export_pooled if config.trained_by == "coordinator" else export_run
    difference = export(folder, options.to, options=wanted, say=print)
    what = "model" if (options.to / "config.json").exists() else "adapter"
    compared = "the size of its changes differs" if wanted.format == "gguf" else "logits differ"
    print(f"{what} written to {options.to}; read back, {compared} by {difference:.0e} at most")
    return 0


def _wanted(options: argparse.Namespace) -> ExportOptions:
    if options.merged and options.format not in (None, "merged"):
        raise ConfigError(f"--merged: contradicts --format {options.format}; leave one out")
    return ExportOptions(
        format="merged" if options.merged else options.format or "peft",
        max_rank=options.max_rank,
        dtype=options.dtype,
        llama_cpp=options.llama_cpp,
        push_to_hub=options.push_to_hub,
        public=options.public,
    )


def add_report(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "write a run's report: one HTML file with curves, plans, traffic, energy and troubles"
    parser = add_command(commands, "report", text, _report, run_folder=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")


def _report(options: argparse.Namespace) -> int:
    from coordinator.report.write import write_report

    folder, config = read_run(options.folder, [])
    sys.stdout.write(f"report: {write_report(folder, config, options.out)}\n")
    return 0
