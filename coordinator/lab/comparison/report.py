"""The report of a comparison as one HTML file that needs nothing else: style and pictures inside.

Knows no training and draws nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.lab.comparison.plots import Picture
from edge_sdk.config.describe import dump_config

if TYPE_CHECKING:
    from coordinator.lab.comparison.config import CompareConfig
    from coordinator.lab.comparison.table import RunResult

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; padding: 0 1rem;
       max-width: 75rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; white-space: nowrap; }
figure { margin: 1rem 0 2rem; } figure img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: 0.85rem; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } th, td { border-color: #444; }
  figure img { background: #fff; } pre { background: #262626; } figcaption, .small { color: #aaa; }
}
"""


def page(
    title: str,
    facts: Sequence[str],
    column_titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    config: str,
) -> str:
    """Return the page.

    Args:
        title: What was compared.
        facts: How, a sentence each.
        column_titles: Titles of the table's columns.
        rows: The table; its first two columns say what a row is of.
        notes: What to know about single rows.
        pictures: In their order.
        config: The configuration, as text.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        _list(facts),
        "<h2>Results</h2>",
        f'<div class="wide">{_table(column_titles, rows)}</div>',
        *(["<h2>What methods could not do</h2>", _list(notes)] if notes else []),
        *(_figure(picture) for picture in pictures),
        f"<h2>Configuration</h2><pre>{escape(config)}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _table(column_titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in column_titles)
    lines = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<h2>{escape(picture.title)}</h2>\n<figure><img alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{data}">\n<figcaption>{escape(picture.caption)}</figcaption>'
        "</figure>"
    )


def write_report(config: CompareConfig, cells: Sequence[RunResult], out: Path) -> str:
    """Write report.html, table.md and the pictures to *out*; returns the table."""
    from coordinator.lab.comparison.plots import draw
    from coordinator.lab.comparison.report import page
    from coordinator.lab.comparison.table import (
        column_titles,
        common_target,
        kept_cells,
        make_rows,
        markdown,
        row_texts,
    )
    from edge_sdk.files import storage_errors

    is_classifier = config.task == "sequence-classification"
    target = config.compare.target
    if target is None:
        target = common_target(kept_cells(cells))
    rows = make_rows(cells, target, is_classifier=is_classifier)
    titles = column_titles(target, is_classifier=is_classifier)
    texts = [row_texts(row, is_classifier=is_classifier) for row in rows]
    pictures = draw(cells, target)
    notes = [f"{r.method}, {r.device_set}: {note}" for r in rows for note in r.notes]
    facts = _facts(config, cells, target)
    with storage_errors(out):
        for picture in pictures:
            (out / f"{picture.name}.png").write_bytes(picture.png)
        (out / "table.md").write_text(markdown(titles, texts) + "\n", encoding="utf-8")
        html = page(
            "Comparison of methods", facts, titles, texts, notes, pictures, dump_config(config)
        )
        (out / "report.html").write_text(html, encoding="utf-8")
    return markdown(titles, texts)


def _facts(config: CompareConfig, cells: Sequence[RunResult], target: float) -> list[str]:
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
