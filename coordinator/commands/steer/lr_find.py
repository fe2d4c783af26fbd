"""`coordinator lr-find`: which learning rate to begin with, by a short training without devices."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say_import
from coordinator.config.presets import load_serve_config
from coordinator.results.json_text import json_text
from edge_sdk.errors import ConfigError
from edge_sdk.files import atomic_write

if TYPE_CHECKING:
    from coordinator.lab.rates.suggestion import SweepPoint
    from coordinator.lab.rates.sweep import Sweep

TEXT = "find a learning rate to begin with: a short training, of which each step has a higher one"
# Rows of the table, and letters of its bar.
MOST_ROWS, BAR = 16, 30


def add_lr_find(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = add_command(commands, "lr-find", TEXT, _find, formats=True)
    parser.add_argument("--config", type=Path, help="YAML file; keys in docs/configuration.md")
    parser.add_argument("--preset", metavar="NAME", help="a method; see `coordinator presets list`")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="what is trained on, read as evaluation.data says; default: the run's pooled data, "
        "its evaluation file, or generated texts",
    )
    parser.add_argument("--from", dest="first", type=float, default=1e-6, metavar="RATE")
    parser.add_argument("--to", dest="last", type=float, default=1.0, metavar="RATE")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("lr-find.svg"),
        metavar="FILE",
        help="picture: .svg, .png or .pdf; default: %(default)s",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _find(options: argparse.Namespace) -> int:
    config = load_serve_config(options.config, options.overrides, preset=options.preset)
    kind = options.plot.suffix.removeprefix(".")
    if kind not in ("svg", "png", "pdf"):
        raise ConfigError(f"--plot: {options.plot} must end in .svg, .png or .pdf")
    say_import()
    from coordinator.lab.comparison.plots import require_matplotlib
    from coordinator.lab.rates.picture import draw_sweep
    from coordinator.lab.rates.sweep import SweepConfig, find_rate

    require_matplotlib()
    wanted = SweepConfig(first=options.first, last=options.last, steps=options.steps)
    sweep = find_rate(config, wanted, options.data, _progress(options.steps))
    picture = draw_sweep(sweep)
    data = dict((("png", picture.png), *picture.vectors))[kind]
    atomic_write(options.plot, data, mode=0o666)
    if options.format == "json":
        facts = {**asdict(sweep.found), "data": sweep.data, "batch_size": sweep.batch_size}
        facts |= {"plot": str(options.plot), "points": [asdict(p) for p in sweep.points]}
        print(json_text(facts))
        return 0
    print("\n".join([*table(sweep.points), "", *words(sweep), f"picture: {options.plot}"]))
    return 0


def _progress(steps: int) -> Any:
    """Return what shows on a terminal how far the sweep is."""
    done = 0

    def told(point: SweepPoint) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            line = f"step {done}/{steps}, rate {point.rate:.1e}, loss {point.loss:.4f}"
            sys.stderr.write(f"\r{line}" if done < steps else f"\r{' ' * len(line)}\r")
            sys.stderr.flush()

    return told


def table(points: Sequence[SweepPoint]) -> list[str]:
    """Return lines of rate and smoothed loss, evenly over the sweep, with a bar for the loss."""
    last = len(points) - 1
    places = sorted({round(n * last / (MOST_ROWS - 1)) for n in range(MOST_ROWS)})
    losses = [points[at].smoothed for at in places]
    low, high = min(losses), max(losses)
    lines = ["    rate      loss"]
    for at in places:
        point = points[at]
        share = (point.smoothed - low) / (high - low) if high > low else 0.0
        lines.append(f"{point.rate:8.1e}  {point.smoothed:8.4f}  {'#' * round(share * BAR)}")
    return [line.rstrip() for line in lines]


def words(sweep: Sweep) -> list[str]:
    """Return what was found, and what it assumes."""
    found = sweep.found
    lines = []
    if found.steepest is None:
        lines.append("suggested: nothing; the loss did not fall. More --steps, or a higher --to")
    else:
        lines.append(f"suggested: training.learning_rate={found.steepest:.1e}")
        is_at_end = found.lowest == sweep.points[-1].rate
        beyond = "it has not risen up to" if is_at_end else "beyond the lowest, it rises from"
        lines.append(f"the loss falls fastest there; {beyond} {found.lowest:.1e}")
    if found.diverged is not None:
        lines.append(f"the sweep ended at {found.diverged:.1e}: beyond it, training breaks down")
    lines.append("assumed: one machine with all blocks, adapters and optimizer of the run,")
    lines.append(f"{sweep.batch_size} sequences a step as of all devices, no rounds;")
    lines.append(f"trained on {sweep.data}")
    if sweep.data == "generated texts":
        lines.append("which say where training breaks down, and little of what is best: see --data")
    return lines
