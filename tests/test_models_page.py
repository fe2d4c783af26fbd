"""docs/models.md says what the check of a split finds, of every family and today."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.families import MORE
from tests.tiny import EXPERTS, FAMILIES, OTHERS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
HAND_WRITTEN, _, REST = PAGE.partition("<!-- Models: written by scripts/docs-models. -->\n")
TABLE, END, _ = REST.partition("<!-- End of models. -->\n")
# Families whose rows take a second or so: splits exactly, with weights left out, and refused.
CHEAP = ("gpt2", "bert", "mpnet", "falcon_mamba", "bart")
# Of their default configs transformers builds no model.
NO_DEFAULT = {"lfm2_moe"}
TOO_LARGE = "the model cannot be made narrow"
HEADINGS = ("Split exactly", "Refused", "Not built", "Without a verdict")
OURS = {
    *((kind, task) for kind, (task, _) in {**FAMILIES, **OTHERS, **EXPERTS}.items()),
    *((kind, task) for kind, task, _ in MORE.values()),
}


def rows(heading: str) -> set[tuple[str, str]]:
    """Return family and task of each row below a heading."""
    own = TABLE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \| ([\w-]+) \|", own, flags=re.MULTILINE))


def test_what_the_script_writes_stands_between_its_marks() -> None:
    """The tables stand behind words by hand, which no run of the script touches."""
    assert HAND_WRITTEN.startswith("# Models\n")
    assert TABLE
    assert END


def test_the_summary_counts_the_rows() -> None:
    """The numbers in the first line are those of the tables below it, each row in one of them."""
    counts = {heading: len(rows(heading)) for heading in HEADINGS}

    exact, refused, not_built, none = counts.values()
    words = f"{exact} split exactly, {refused} refused, {not_built} not built"
    words += f", {none} without a verdict" if none else ""
    assert TABLE.startswith(f"{sum(counts.values())} rows: {words}; ")
    assert len(re.findall(r"^\| `", TABLE, re.MULTILINE)) == sum(counts.values())


def test_nobody_is_without_a_verdict_but_for_its_size() -> None:
    """No family ends in an error that the check has not put into words, nor is too slow for it."""
    left = TABLE.partition("## Without a verdict\n")[2]

    reasons = dict(re.findall(r"^\| `(.*?)`.*\| ([^|]+) \|$", left, flags=re.MULTILINE))
    assert set(reasons.values()) <= {TOO_LARGE}


@pytest.mark.parametrize(("family", "task"), sorted(OURS))
def test_a_family_of_the_tests_splits_exactly(family: str, task: str) -> None:
    """What the tests prove on tiny configs the page says of default ones."""
    heading = "Not built" if family in NO_DEFAULT else "Split exactly"
    assert (family, task) in rows(heading)


def test_the_page_is_of_the_versions_that_are_tested() -> None:
    """Other pinned versions are a reason to run scripts/docs-models again."""
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M))

    assert f"; transformers {pinned['transformers']}, torch {pinned['torch']}.\n" in TABLE


@pytest.mark.skipif(
    f"transformers {version('transformers')}," not in TABLE,
    reason="the page is of another version of transformers than the one here",
)
def test_rows_are_what_the_check_says_today() -> None:
    """scripts/docs-models finds again what stands on the page, of a few families."""
    families = [word for family in CHEAP for word in ("--only", family)]

    result = subprocess.run(
        ["sh", str(ROOT / "scripts" / "docs-models"), "--check", *families],
        env={**os.environ, "EDGESPLIT_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
