"""`coordinator simulate`: a run whose devices are not there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.config.presets import NAMES, load_with_preset
from coordinator.lab.simulation.config import SimulationConfig
from edge_sdk.errors import INTERRUPTED_EXIT_CODE

if TYPE_CHECKING:
    from coordinator.lab.simulation.result import SimulationResult


def add_simulate(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "train on simulated devices, with a modelled clock"
    parser = commands.add_parser("simulate", help=text, description=text)
    parser.add_argument("--config", type=Path, help="YAML file; see docs/simulation.md")
    parser.add_argument("--preset", choices=NAMES, help="a published method: docs/presets.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")
    parser.set_defaults(run=_simulate)


def load_simulation(
    file: Path | None, overrides: Sequence[str] = (), preset: str | None = None
) -> SimulationConfig:
    """Return the config of a simulation: a preset below the file below the overrides.

    Raises:
        ConfigError: as `load_config`; or a setting contradicts the preset.
    """
    return load_with_preset(SimulationConfig, file, overrides, preset=preset)


def _simulate(options: argparse.Namespace) -> int:
    from coordinator.lab.simulation.run import simulate
    from coordinator.page.beside import page_beside
    from coordinator.results.console import Console
    from coordinator.results.lifecycle import COMPLETED, STOPPED
    from coordinator.results.standing.live_file import LiveFile
    from coordinator.results.watchers import Watchers

    config = load_simulation(options.config, options.overrides, options.preset)
    with Console(config.total_steps) as console:
        with page_beside(config.page, config.page_token, console) as shown:
            result = simulate(config, Watchers([shown, LiveFile()]))
        console.note(summary(result))
    return 0 if result.outcome in (COMPLETED, STOPPED) else INTERRUPTED_EXIT_CODE


def summary(result: SimulationResult) -> str:
    """Say in a line what came of it."""
    last = result.rounds[-1]
    loss = "" if last.loss is None else f", loss {last.loss:.4f}"
    return (
        f"{result.folder.path}: {last.round} rounds, {last.samples} samples{loss}; "
        f"modelled {last.seconds:.1f} s, up {last.bytes_up / 1e6:.1f} MB, "
        f"down {last.bytes_down / 1e6:.1f} MB"
    )
