"""A real browser for tests: Debian's chromium, driven by Playwright; skipped without one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT_MS = 40_000
# What the policy refuses of plotly's own, without harm: empty style attributes, styles of its maps.
PLOTLY = "/static/plotly.min.js"
_NOTE_REFUSALS = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.refused.push(`${event.sourceFile} ${event.violatedDirective}`);
});
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page in a browser, and what went wrong in it."""

    def __init__(self, browser: Any, width: int = 1280, height: int = 800, **more: Any) -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        context.set_default_timeout(WAIT_MS)
        self.page = context.new_page()
        self.errors: list[str] = []
        self.page.add_init_script(_NOTE_REFUSALS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))

    def text(self, where: str) -> str:
        """Return what is written somewhere."""
        return str(self.page.text_content(where))

    def wait(self, condition: str, argument: Any = None) -> None:
        """Wait until a condition in JavaScript is true."""
        # A function: a plain expression would need the `eval` that the page forbids.
        self.page.wait_for_function(f"(argument) => {condition}", arg=argument)

    def refused(self) -> list[str]:
        """Return what the policy has refused, what plotly does of its own left out."""
        return [what for what in self.page.evaluate("window.refused") if PLOTLY not in what]

    def is_too_wide(self) -> bool:
        """Return whether the page must be moved sideways to be read."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))
