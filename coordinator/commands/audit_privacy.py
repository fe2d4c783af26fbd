"""`coordinator audit-privacy`: how much of a sample somebody recovers who sees what leaves."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.results.json_text import json_text
from edge_sdk.errors import ConfigError
from edge_sdk.files import make_folder, storage_errors

if TYPE_CHECKING:
    from coordinator.lab.privacy.config import AuditConfig
    from coordinator.lab.privacy.report import AuditReport
    from coordinator.lab.privacy.table import Table


def add_audit_privacy(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "measure how much of a text leaves a device at each split point and codec"
    audit = add_command(commands, "audit-privacy", text, _audit, formats=True)
    add = audit.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="texts like those of devices")
    add("--model", metavar="FOLDER", help="folder or hub id: devices run its blocks as they are")
    add(
        "--run",
        type=Path,
        dest="folder",
        metavar="RUN",
        help="or a run's folder: with what it has learned",
    )
    add("--task", choices=("causal-lm", "sequence-classification"))
    add("--public", nargs="+", metavar="FILE", help="what attackers learn from; default: half")
    add("--codecs", nargs="+", metavar="NAME", help="default: every codec")
    add("--splits", nargs="+", type=int, metavar="BLOCKS", help="default: every split point")
    add("--share", type=float, help="least recovery that rules a split out; default: 0.5")
    add("--tokens", type=int, help="most tokens to recover; default: 2000")
    add("--public-tokens", type=int, help="most tokens to learn from; default: 20000")
    add("--search", type=int, dest="searched", help="most tokens to search; default: 64")
    add("--seed", type=int)
    add("--out", type=Path, metavar="FOLDER", help="write report.html, picture, table and JSON")
    add("overrides", nargs="*", metavar="data.key=value", help="how the files are read")


def load_audit(options: argparse.Namespace) -> AuditConfig:
    """Return what the options ask for.

    Raises:
        ConfigError: a value is none that there is.
    """
    from coordinator.lab.privacy.config import AuditConfig
    from edge_sdk.config.loader import load_config

    names = ("model", "task", "share", "tokens", "public_tokens", "searched", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.folder is not None:
        given["run"] = options.folder  # `run` is what argparse calls
    for name in ("public", "codecs", "splits"):
        if (several := getattr(options, name)) is not None:
            given[name] = tuple(several)
    config = load_config(AuditConfig, None, options.overrides, env={})
    data = replace(config.data, path=tuple(options.data))
    try:
        return replace(config, data=data, **given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _audit(options: argparse.Namespace) -> int:
    config = load_audit(options)
    if options.out is not None:
        from coordinator.lab.comparison.plots import require_matplotlib

        require_matplotlib()  # before minutes of attacks, not after
        make_folder(options.out)
    from coordinator.lab.privacy.audit import audit

    report = audit(config, _say)
    if options.out is not None:
        _write(config, report, options.out)
    if options.format == "json":
        print(json.dumps(as_json(report), indent=2))
    else:
        _print(report)
    return 0


def as_json(report: AuditReport) -> Any:
    """Return all that was found, and what is suggested, as plain values."""
    least = {codec: report.least_split(codec) for codec in report.codecs}
    suggested = {"min_split": report.suggested, "least_split": least, "by": report.kind}
    return json.loads(json_text({**asdict(report), "suggested": suggested}))


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")


def _print(report: AuditReport) -> None:
    from rich.console import Console

    from coordinator.lab.privacy.table import advice, facts, tables

    out = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    for text in facts(report):
        out.print(text)
    for table in tables(report):
        out.print()
        out.print(table.title)
        out.print(_rich(table))
    for text in advice(report):
        out.print(text)


def _rich(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable

    found = RichTable(box=box.SIMPLE_HEAD)
    for head in table.heads:
        found.add_column(head, justify="right", no_wrap=True)
    for row in table.rows:
        found.add_row(*row)
    return found


def _write(config: AuditConfig, report: AuditReport, out: Path) -> None:
    from coordinator.lab.comparison.report import Page
    from coordinator.lab.privacy.picture import draw
    from coordinator.lab.privacy.table import advice, at_once, facts, markdown, tables
    from edge_sdk.config.describe import dump_config

    whole = at_once(report)
    page = Page(
        title="What leaves a device",
        facts=[*facts(report), *advice(report)],
        column_titles=whole.heads,
        rows=whole.rows,
        notes=(),
        pictures=[draw(report)],
        config=dump_config(config),
    )
    page.write(out)
    with storage_errors(out):
        found = "\n\n".join(map(markdown, tables(report)))
        (out / "audit.md").write_text(found + "\n", "utf-8")
        (out / "audit.json").write_text(json_text(as_json(report), indent=2) + "\n", "utf-8")
