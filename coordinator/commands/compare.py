"""`coordinator compare`: run methods against each other and write a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.terminal import Live, say, say_results
from coordinator.lab.comparison.report import write_report
from coordinator.lab.comparison.sweeps.report import write_sweep_report
from coordinator.lab.comparison.sweeps.table import SweptRuns
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError

if TYPE_CHECKING:
    from coordinator.lab.comparison.cells import RunResult
    from coordinator.lab.comparison.result_table import ResultTable
    from coordinator.lab.comparison.run import Comparison
    from coordinator.lab.comparison.sweeps.grid import GridPoint


def add_compare(commands: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Register the command with the parser of `coordinator`."""
    text = "run methods on the same simulated devices and compare them"
    parser: argparse.ArgumentParser = commands.add_parser("compare", help=text, description=text)
    parser.set_defaults(run=_compare)
    parser.add_argument("--config", type=Path, help="YAML file; see docs/compare.md")
    parser.add_argument(
        "--presets", nargs="+", metavar="NAME", help="instead of compare.presets of the file"
    )
    parser.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="compare for each value of a key of the config; several make a grid",
    )
    parser.add_argument(
        "--labels",
        choices=("device", "server", "published"),
        help="where the labels of all methods are; published: where each preset has them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder; default: %(default)s"
    )
    parser.add_argument(
        "--scale",
        metavar="NAME",
        help="one of `paper.scales` of the file: tiny runs here in minutes",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | key=value",
        help="the file, without --config; and what overrides it",
    )


def _compare(options: argparse.Namespace) -> int:
    from coordinator.lab.comparison.plots import require_matplotlib

    require_matplotlib()  # before hours of training, not after
    from coordinator.lab.comparison.config import load_compare
    from coordinator.lab.comparison.run import compare_each
    from coordinator.lab.comparison.sweeps.grid import grid, read_sweep
    from coordinator.lab.simulation.run import simulate

    options.config = _file(options)
    points = grid([read_sweep(text) for text in options.sweep])
    comparisons = [_comparison(options, point) for point in points]
    _require_what_runs_need(comparisons)
    swept: list[SweptRuns] = []
    tables: list[ResultTable] = []
    try:
        with Live() as live:
            live.now("getting ready")
            every = compare_each(comparisons, live.line, simulate, live.now)
            for point, comparison, cells in zip(points, comparisons, every, strict=True):
                tables = write_report(comparison.config, cells, comparison.out)
                swept.append(SweptRuns(point, cells))
    except KeyboardInterrupt:
        say("stopped; runs that have ended are kept, and the same command goes on with the others")
        return INTERRUPTED_EXIT_CODE
    if options.sweep:
        config = load_compare(options.config, _overrides(options))
        tables = [write_sweep_report(config, swept, options.out)]
    for table in tables:
        say_results(table.title, table.titles, table.texts)
    for comparison, runs in zip(comparisons, swept, strict=True):
        say_what_is_open(comparison, runs.cells)
    say(f"\n{options.out / 'report.html'}; the tables also as .md, .csv and .tex beside it")
    return 0


def _comparison(options: argparse.Namespace, point: GridPoint) -> Comparison:
    """Return the comparison of one point of a grid; that of no sweep has the folder for itself."""
    from coordinator.lab.comparison.config import load_compare, load_methods
    from coordinator.lab.comparison.run import Comparison

    overrides = [*_overrides(options), *point.overrides]
    config = load_compare(options.config, overrides)
    methods = load_methods(config, options.config, overrides)
    return Comparison(config, methods, options.out / point.folder, point.name)


def say_what_is_open(comparison: Comparison, cells: Sequence[RunResult]) -> None:
    """Say which learning rates are not settled, so that nobody reads more into a row."""
    from coordinator.lab.comparison.search.table import in_sentences, unsettled

    search = comparison.config.compare.learning_rate_search
    if texts := in_sentences(unsettled(cells, search)):
        where = f" ({comparison.name})" if comparison.name else ""
        say(f"\nNot settled{where}; no place is given where the first one is among them:")
        for text in texts:
            say(f"  {text}")


def _file(options: argparse.Namespace) -> Path | None:
    """Return the file, which is the one word without a `=` or stands behind --config."""
    words = [Path(text) for text in options.overrides if "=" not in text]
    given = [options.config] if options.config is not None else []
    if len(words) + len(given) > 1:
        named = ", ".join(map(str, (*given, *words)))
        raise ConfigError(f"a comparison has one file, got {named}")
    file: Path | None = next(iter((*given, *words)), None)
    return file


def _require_what_runs_need(comparisons: Sequence[Comparison]) -> None:
    """Fail before hours of training where a paper's experiment lacks its model or a program."""
    from coordinator.lab.comparison.published.recipe import require_model
    from coordinator.scores.measures import require_programs

    for comparison in comparisons:
        if comparison.config.paper is not None:
            require_programs(comparison.config.evaluation.scores)
            require_model(comparison.config)


def _overrides(options: argparse.Namespace) -> list[str]:
    from coordinator.lab.comparison.published.recipe import recipe_overrides

    flags = {
        "presets": options.presets,
        "learning_rates": options.rates,
        "seeds": options.seeds,
    }
    given = [f"compare.{key}={list(value)}" for key, value in flags.items() if value is not None]
    if options.labels is not None:
        given.append(f"compare.labels={options.labels}")
    own = [text for text in options.overrides if "=" in text]
    own += [text.replace("'", "") for text in given]
    return recipe_overrides(options.config, own, options.scale)
