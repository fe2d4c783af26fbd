"""The report of a comparison as one HTML file that needs nothing else: style and pictures inside.

Knows no training and draws nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from coordinator.lab.comparison.plots import Picture

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
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    config: str,
) -> str:
    """Return the page.

    Args:
        title: What was compared.
        facts: How, a sentence each.
        heads: Titles of the table's columns.
        rows: The table; its first two columns say what a row is of.
        notes: What to know about single rows.
        pictures: In their order.
        config: The configuration, as text.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        _list(facts),
        "<h2>Results</h2>",
        f'<div class="wide">{_table(heads, rows)}</div>',
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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
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
