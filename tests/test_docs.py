"""The documentation agrees with the source, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def prose(text: str) -> str:
    """Return *text* without code, in which brackets are no links and `#` is no heading."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*\]\([^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return what may follow `#` in a link to *page*: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.*?) *#*$", prose(page.read_text("utf-8")), flags=re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {slug.replace(" ", "-") for slug in slugs}


def is_dead(link: str, page: Path) -> bool:
    """Whether a link on *page* into this repository leads nowhere."""
    if re.match(r"[a-z]+:", link):
        return False
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return True
    return bool(anchor) and target.suffix == ".md" and anchor not in anchors(target)


def test_the_generated_pages_are_up_to_date() -> None:
    """scripts/docs would change nothing."""
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_resolve(name: str) -> None:
    """Every link to a file of ours, and to a heading in it, leads somewhere."""
    page = ROOT / name

    links = LINK.findall(prose(page.read_text(encoding="utf-8")))

    assert [link for link in links if is_dead(link, page)] == []
