"""The page of a report: what it says is text, never markup, and it needs no other file."""

from __future__ import annotations

import base64

from coordinator.lab.comparison.plots import Picture
from coordinator.lab.comparison.report import Page

PNG = b"\x89PNG"


def make_page(text: str, notes: tuple[str, ...] = ()) -> str:
    """A page that says *text* wherever it can."""
    picture = Picture("loss", text, text, PNG)
    return Page(
        title=text,
        facts=[text],
        column_titles=[text],
        rows=[[text]],
        notes=notes,
        pictures=[picture],
        config=text,
    ).html()


def test_what_a_page_says_is_never_markup() -> None:
    """Names, notes and configuration come from files of others: all of it is escaped."""
    page = make_page("<script>alert('x')</script>", ("<b>",))

    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 9


def test_pictures_are_inside_and_notes_only_where_there_are_some() -> None:
    """The file can be sent as it is; without notes there is no empty section for them."""
    page = make_page("all")

    assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in page
    assert "<h2>Notes</h2>" not in page
    assert "<li>a note</li>" in make_page("all", ("a note",))
