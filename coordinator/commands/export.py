"""`coordinator export`: the adapter or the whole model of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.results.lifecycle import read_run
from edge_sdk.errors import ConfigError


def add_export(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "write a run's adapter or model"
    export = add_command(commands, "export", text, _export, run_folder=True)
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument("--merged", action="store_true", help="the whole model, adapter merged in")


def _export(options: argparse.Namespace) -> int:
    from coordinator.export.run import export_run
    from coordinator.lab.centralised.run import export_pooled

    if options.to.exists() and any(options.to.iterdir()):
        raise ConfigError(f"{options.to} exists and is not empty; choose another folder")
    folder, config = read_run(options.folder, [])
    export = export_pooled if config.trained_by == "coordinator" else export_run
    difference = export(folder, options.to, merged=options.merged)
    what = "adapter" if (options.to / "adapter_config.json").exists() else "model"
    print(f"{what} written to {options.to}; read back, logits differ by {difference:.0e} at most")
    return 0
