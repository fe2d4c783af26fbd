"""`coordinator compare`: run methods against each other and write a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.config.loader import dump_config

if TYPE_CHECKING:
    from coordinator.lab.comparison.config import CompareConfig
    from coordinator.lab.comparison.table import Cell


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
        "--out", type=Path, default=Path("comparison"), help="folder; default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _compare(options: argparse.Namespace) -> int:
    from coordinator.lab.comparison.plots import require_matplotlib

    require_matplotlib()  # before hours of training, not after
    from coordinator.lab.comparison.config import load_compare, load_methods
    from coordinator.lab.comparison.run import compare

    overrides = _overrides(options)
    config = load_compare(options.config, overrides)
    methods = load_methods(config, options.config, overrides)
    cells = compare(config, methods, options.out, _say)
    table = write_report(config, cells, options.out)
    _say(f"{table}\n\n{options.out / 'report.html'}")
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    flags = {
        "presets": options.presets,
        "learning_rates": options.rates,
        "seeds": options.seeds,
    }
    given = [f"compare.{key}={list(value)}" for key, value in flags.items() if value is not None]
    return [*options.overrides, *(text.replace("'", "") for text in given)]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_report(config: CompareConfig, cells: Sequence[Cell], out: Path) -> str:
    """Write report.html, table.md and the pictures to *out*; returns the table."""
    from coordinator.lab.comparison.plots import draw
    from coordinator.lab.comparison.report import page
    from coordinator.lab.comparison.table import (
        common_target,
        heads,
        kept_cells,
        make_rows,
        markdown,
        row_texts,
    )
    from coordinator.results.run_folder import storage_errors

    is_classifier = config.task == "sequence-classification"
    target = config.compare.target
    if target is None:
        target = common_target(kept_cells(cells))
    rows = make_rows(cells, target, is_classifier=is_classifier)
    titles = heads(target, is_classifier=is_classifier)
    texts = [row_texts(row, is_classifier=is_classifier) for row in rows]
    pictures = draw(cells, target)
    notes = [f"{r.method}, {r.device_set}: {note}" for r in rows for note in r.notes]
    facts = _facts(config, cells, target)
    with storage_errors(str(out)):
        for picture in pictures:
            (out / f"{picture.name}.png").write_bytes(picture.png)
        (out / "table.md").write_text(markdown(titles, texts) + "\n", encoding="utf-8")
        html = page(
            "Comparison of methods", facts, titles, texts, notes, pictures, dump_config(config)
        )
        (out / "report.html").write_text(html, encoding="utf-8")
    return markdown(titles, texts)


def _facts(config: CompareConfig, cells: Sequence[Cell], target: float) -> list[str]:
    """How it was compared, a sentence each."""
    wanted = config.compare
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.rate for cell in cells}))
    chosen = "" if wanted.target is not None else ", which every run reached"
    return [
        f"Model {Path(config.model).name}; seeds {', '.join(map(str, wanted.seeds))}, of which a "
        "number after \u00b1 is the sample standard deviation. Each seed deals the data out anew.",
        f"Learning rates {rates}: every method tried all of them on seed {wanted.seeds[0]} and "
        "kept, for each set of devices, the one with the lowest final loss.",
        f"Time is modelled from operations, bytes and data sheets, to a loss of {target:.4g}"
        f"{chosen}, between evaluations on a straight line. `Simulated in` is what this machine "
        "took for it, one device after the other.",
        "All methods train on the same number of samples, to the nearest whole round. Methods "
        "without devices (cenlora, ft) train on the joined data on the coordinator's machine; "
        "sending the data there is not counted.",
        "Homogeneous: all devices are like the one with the median memory. A device that cannot "
        "hold its part drops out with its data; one cut and one rank for all are what the weakest "
        "device can hold; hlora and hetlora give each device the largest rank that fits it.",
        "Peak memory and numbers trained are those of the smallest and the largest device. Memory "
        "is predicted from the plan: all simulated devices share one process, whose measured peak "
        "is nobody's.",
    ]
