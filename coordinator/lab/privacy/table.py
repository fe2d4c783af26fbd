"""The numbers of an audit as tables and sentences: for a terminal, for a page, for a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.lab.privacy.report import ATTACKS, SEARCH, AuditReport
from coordinator.lab.privacy.score import KINDS, PROMPTS, Recovery

NOTHING = "-"


class Table(NamedTuple):
    """Rows under titles; the first column names the row."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def percent(share: float) -> str:
    """Return a share as text; what is not all is never written as all."""
    if 0.995 <= share < 1.0:
        return f"{min(share, 0.9994):.1%}"
    return f"{share:.0%}"


def by_codec(report: AuditReport, kind: str) -> Table:
    """Return the share of tokens that the best attack names at once, by split and codec."""
    heads = ("split", *report.codecs)
    rows = []
    for split in report.splits:
        best = [report.best(split, codec, kind) for codec in report.codecs]
        rows.append((str(split), *(_one(cell.found[kind]) if cell else NOTHING for cell in best)))
    title = f"{kind} from hidden states: tokens recovered by the best attack"
    return Table(title, heads, rows)


def by_attack(report: AuditReport, kind: str, codec: str) -> Table:
    """Return what each attack recovers with one codec: at once, among ten, whole texts."""
    tried = [name for name in ATTACKS if any(cell.attack == name for cell in report.cells)]
    rows = []
    for split in (0, *report.splits):
        own = {
            c.attack: c.found.get(kind)
            for c in report.cells
            if (c.split, c.codec) == (split, codec)
        }
        if any(own.values()):
            rows.append((str(split), *(_three(own.get(name), name) for name in tried)))
    title = f"{kind}, codec {codec}, per cent of tokens at once / among ten / of whole texts"
    return Table(title, ("split", *tried), rows)


def at_once(report: AuditReport) -> Table:
    """Return what is recovered at once of everything, by codec, in one table."""
    rows = [
        (kind, *row)
        for kind in KINDS
        if kind in report.baseline
        for row in by_codec(report, kind).rows
    ]
    if report.labels:
        told = {cell.codec: percent(cell.found.top1) for cell in report.labels}
        rows.append(("targets, by gradients", "any", *(told[codec] for codec in report.codecs)))
    title = "tokens recovered at once by the best attack"
    return Table(title, ("", "split", *report.codecs), rows)


def of_labels(report: AuditReport) -> Table:
    """Return what gradients tell of targets, by codec."""
    rows = [
        (cell.codec, *map(percent, (cell.found.top1, cell.found.top10, cell.found.exact)))
        for cell in report.labels
    ]
    heads = ("codec", "at once", "among ten", "whole texts")
    return Table("targets from the top gradient, labels: device, at every split", heads, rows)


def _one(found: Recovery) -> str:
    return percent(found.top1)


def _three(found: Recovery | None, attack: str) -> str:
    if found is None:
        return NOTHING
    ten = NOTHING if attack == SEARCH else percent(found.top10)
    return " / ".join(text.rstrip("%") for text in (percent(found.top1), ten, percent(found.exact)))


def tables(report: AuditReport) -> list[Table]:
    """Return all tables."""
    found = []
    for kind in KINDS:
        if kind in report.baseline:
            found += [by_codec(report, kind), by_attack(report, kind, report.codecs[0])]
    return [*found, of_labels(report)] if report.labels else found


def facts(report: AuditReport) -> list[str]:
    """Return what was tried on what, a sentence each."""
    found = [
        f"model {report.model}, {report.num_blocks} blocks, which have learned {report.learned}; "
        f"{report.texts:,} texts of {report.tokens:,} tokens, seed {report.seed}",
        f"the attacker has learned from {report.known_tokens:,} tokens of {report.known_from}",
    ]
    for kind, known in report.baseline.items():
        found.append(
            f"baseline, {kind}: who knows only how frequent tokens are names {known.top1:.1%} of "
            f"{known.tokens:,} at once, {known.top10:.1%} among ten, and {known.exact:.1%} of "
            f"{known.sentences:,} whole texts"
        )
    if report.told is not None:
        found.append(
            f"positions: where targets stand is told of {percent(report.told.exact)} of "
            f"{report.told.texts:,} texts; {percent(report.told.alone)} are alone with their shape"
        )
    searched = {c.found[k].tokens for c in report.cells if c.attack == SEARCH for k in c.found}
    if searched:
        found.append(
            f"search has tried the shortest texts alone: {_listed(sorted(searched))} tokens"
        )
    return [*found, *report.notes]


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(f"{number:,}" for number in numbers)


def advice(report: AuditReport) -> list[str]:
    """Return what the numbers mean for a run, a sentence each."""
    least = {codec: report.least_split(codec) for codec in report.codecs}
    told = ", ".join(f"{codec} {_blocks(report, split)}" for codec, split in least.items())
    found = [
        f"least split from which on less than {report.share:.0%} of {report.kind} are recovered: "
        f"{told}"
    ]
    alone = {attack: report.least_split_of(attack) for attack in ATTACKS}
    known = [f"{name} {_blocks(report, split)}" for name, split in alone.items() if split]
    found.append(f"the same by each attack alone, whatever the codec: {', '.join(known)}")
    suggested = report.suggested
    own = "all" if suggested == report.num_blocks else str(suggested)
    lines = f"planning.min_split: {suggested} for the run, accept.min_split: {own} on devices"
    if suggested == report.num_blocks:
        found.append(
            f"no smaller split does for all of these codecs: {lines}; with all blocks on a device "
            "no hidden state leaves it"
        )
    else:
        found.append(f"suggested: {lines}")
    if report.labels and report.kind == PROMPTS:
        most = max(report.labels, key=lambda cell: cell.found.top1)
        found.append(
            f"no split hides targets: their gradients tell {percent(most.found.top1)} of them with "
            f"labels: device ({most.codec}), and with labels: server they are sent"
        )
    found.append(
        "these are attacks that were tried; a stronger one recovers more, and no number here is a "
        "defence"
    )
    return found


def _blocks(report: AuditReport, split: int | None) -> str:
    return "all blocks" if split == report.num_blocks else str(split)


def markdown(table: Table) -> str:
    """Return a table in Markdown, under its title."""
    lines = ["| " + " | ".join(table.heads) + " |", "|" + "---|" * len(table.heads)]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return f"{table.title}:\n\n" + "\n".join(lines)
