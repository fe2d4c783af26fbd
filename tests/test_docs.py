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
# What may name a page: code, and the settings that stand beside it.
FOLDERS = ("profiler", "edge_sdk", "coordinator", "benchmarks", "examples", "scripts", "tests")
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".service", ".yaml", "")
    if path.is_file() and path != Path(__file__)
)
# Pages that the product itself writes.
WRITTEN = {"audit.md", "sweep.md", "table.md"}
NAMED = re.compile(r"(?<![\w./*-])([\w./-]*\w\.md)\b(?:, ([A-Z][\w ]*\w))?")
# Pages that speak of what is there today, and not of what was.
TODAY = [name for name in PAGES if not name.startswith(("benchmarks/", "CHANGELOG"))]
NO_FILE = r"(?<!\.key)(?<!\.pub)(?<!\.yaml)(?<!\.md)"
MODULE = re.compile(r"(?<![\w-])(profiler|edge_sdk|coordinator)\.([a-z][a-z_.]*[a-z])\b" + NO_FILE)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def prose(text: str) -> str:
    """Return *text* without code, in which brackets are no links and `#` is no heading."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*\]\([^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return what may follow `#` in a link to *page*: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.*?) *#*$", prose(page.read_text("utf-8")), flags=re.MULTILINE)
    return {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    """Return what GitHub puts behind `#` for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda p: p.name)
def test_a_file_in_a_picture_exists(picture: Path) -> None:
    """What a picture names with its folder is there."""
    names = re.findall(r"[\w/]+/\w+\.py", picture.read_text(encoding="utf-8"))

    assert [name for name in names if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", TODAY)
def test_a_page_names_what_is_there(name: str) -> None:
    """A file on a page is one of ours, by the end of its path, and so is a module with dots."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tails = [f"/{source}" for source in SOURCES]
    files = set(re.findall(r"`([\w/]*\w\.py)`", text))
    modules = {".".join(match) for match in MODULE.findall(text)}

    assert [file for file in files if not any(tail.endswith(f"/{file}") for tail in tails)] == []
    assert [module for module in modules if not is_ours(module)] == []


def is_ours(module: str) -> bool:
    """Whether a dotted name is a module, or something that may stand in one."""
    paths = [ROOT.joinpath(*module.split(".")), ROOT.joinpath(*module.split(".")[:-1])]
    return any(path.with_suffix(".py").is_file() for path in paths) or paths[0].is_dir()


@pytest.mark.parametrize("name", SOURCES)
def test_a_page_that_the_code_names_exists(name: str) -> None:
    """A page named in code is there, and so is the section after it: `docs/x.md, Section`."""
    text = re.sub(r"\s+(# )?", " ", (ROOT / name).read_text(encoding="utf-8"))
    for page, section in NAMED.findall(text):
        places = [ROOT / page, ROOT / "docs" / page, (ROOT / name).parent / page]
        found = next((place for place in places if place.is_file()), None)

        assert found is not None or page in WRITTEN, page
        assert not section or found is None or slug(section) in anchors(found), section
