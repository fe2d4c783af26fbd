"""What one check of `edge-sdk doctor` has found, and how it is written for people and programs.

Knows no check.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure", "skipped"]
COLOURS: dict[Status, int] = {"ok": 32, "warning": 33, "failure": 31, "skipped": 90}
PLURALS: dict[Status, str] = {"warning": "warnings", "failure": "failures"}
STATUS_WIDTH = max(map(len, COLOURS)) + 2
LEAST_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Its name; the same on every device and in every version."""
    status: Status
    text: str
    """What was found and what it means, for a person."""
    cure: str = ""
    """The command, or the setting, that mends it; empty where there is nothing to mend."""


def ok(check: str, text: str) -> Finding:
    """Return the finding that all is well; *text* says what was found."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, cure: str = "") -> Finding:
    """Return the finding that a run may work, but not as it should."""
    return Finding(check, "warning", text, cure)


def failure(check: str, text: str, cure: str = "") -> Finding:
    """Return the finding that a run cannot work."""
    return Finding(check, "failure", text, cure)


def skipped(check: str, text: str, cure: str = "") -> Finding:
    """Return the finding that something was not looked at, for the reason given."""
    return Finding(check, "skipped", text, cure)


def as_lines(
    finding: Finding, name_width: int, *, width: int | None = None, colours: bool = False
) -> str:
    """Return *finding* as a line, and its cure as another below it.

    Args:
        finding: What to write.
        name_width: Columns for the names of checks.
        width: Columns of the terminal: a longer text is wrapped, a command never; None does not.
        colours: Whether the terminal shows colours.
    """
    status: str = finding.status
    mark = f"\033[{COLOURS[finding.status]}m{status}\033[0m" if colours else status
    gap = " " * (STATUS_WIDTH - len(status))
    margin = " " * (STATUS_WIDTH + name_width)
    text = finding.text
    if width is not None:
        room = max(LEAST_WIDTH, width - len(margin))
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        text = ("\n" + margin).join(lines)
    line = f"{mark}{gap}{finding.check:<{name_width}}{text}"
    return f"{line}\n{margin}-> {finding.cure}" if finding.cure else line


def as_json(findings: Sequence[Finding]) -> str:
    """Return *findings* as a JSON list of objects with check, status, text and cure."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def summary(findings: Sequence[Finding]) -> str:
    """Return one line: how many checks there were, and how they ended."""
    counts = Counter(finding.status for finding in findings)
    parts = [
        f"{counts[status]} {PLURALS.get(status, status) if counts[status] > 1 else status}"
        for status in COLOURS
        if counts[status]
    ]
    return f"{len(findings)} check{'s' * (len(findings) != 1)}: {', '.join(parts)}"
