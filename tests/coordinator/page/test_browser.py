"""The page in a real browser, from recorded runs: what is drawn, and what no text can do to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from coordinator.results.events.devices import DeviceLeft, MessageRejected
from tests.coordinator.page.browser import Tab, chromium
from tests.coordinator.page.recorded import Recording
from tests.coordinator.page.served import served

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
TOKEN = "a-token-of-twenty-four-letters"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests of this file."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: three devices that are done, two hundred that have stopped."""
    folder = tmp_path_factory.mktemp("runs")
    Recording(folder, ["garage", "kitchen", "van"], 4, "three").play()
    names = [f"device-{number:03d}" for number in range(200)]
    Recording(folder, names, 2, "many").play(ends=False)
    return folder


def test_a_recorded_run_is_drawn(browser: Any, runs: Path) -> None:
    """Cards with blocks and ranks, timeline, curves, heat map, plan, events; without an error."""
    with served(runs / "three") as page:
        tab = Tab(browser)
        tab.page.goto(page.url)
        tab.page.wait_for_selector("#curves .scatterlayer .trace")
        tab.page.wait_for_selector("#importance .hm")

        assert tab.text("#run-state") == "complete"
        assert tab.page.locator(".card").count() == 3
        garage = tab.page.locator(".card").first
        assert "Jetson Orin Nano 8GB" in garage.inner_text()
        assert "2 of 16 blocks" in garage.inner_text()
        assert garage.locator(".blocks rect.there").count() == 14
        assert garage.locator(".blocks rect.rank").count() > 0
        assert tab.page.locator("#plan tbody tr").count() == 3
        assert "bandwidth of a link has changed" in tab.text("#plannings")
        assert "aggregation" in tab.text("#timeline-legend")
        pixels = (
            "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)"
        )
        assert tab.page.eval_on_selector("#timeline", pixels)
        tab.page.get_by_role("button", name="trouble").click()
        events = tab.page.locator("#events li").all_inner_texts()
        assert len(events) == 3
        assert any("the link is gone" in line for line in events)
        tab.page.fill("#event-filter", "link")
        assert tab.page.locator("#events li").count() == 1
        assert tab.errors == []
        assert tab.refused() == []


@pytest.mark.parametrize(
    ("run", "width", "height"),
    [("three", 390, 844), ("many", 390, 844), ("three", 1366, 800), ("many", 2200, 1200)],
)
def test_it_fits_every_width(browser: Any, runs: Path, run: str, width: int, height: int) -> None:
    """A phone, a laptop and a wide screen show few and many devices without moving sideways."""
    with served(runs) as page:
        tab = Tab(browser, width, height)
        tab.page.goto(f"{page.url}?run={run}")
        tab.page.wait_for_selector("#curves .scatterlayer .trace")

        assert not tab.is_too_wide()
        assert tab.page.locator(".card").count() == (3 if run == "three" else 60)
        if run == "many":
            tab.page.fill("#device-filter", "device-199")
            tab.wait("document.querySelectorAll('.card').length === 1")
        assert tab.errors == []


def test_day_and_night(browser: Any, runs: Path) -> None:
    """Colours follow the system, until the button says otherwise; that is kept."""
    with served(runs / "three") as page:
        tab = Tab(browser, color_scheme="dark")
        back = "getComputedStyle(document.body).backgroundColor"
        tab.page.goto(page.url)
        tab.page.wait_for_selector(".card")
        dark = tab.page.evaluate(back)
        tab.page.click("#theme")
        light = tab.page.evaluate(back)
        tab.page.reload()
        tab.page.wait_for_selector(".card")

        assert (tab.text("#theme"), tab.page.evaluate(back)) == ("light", light)
        assert light != dark


def test_no_text_becomes_part_of_the_page(browser: Any, tmp_path: Path) -> None:
    """Names, boards, reasons and samples with tags are shown letter by letter, and run nothing."""
    run = Recording(tmp_path, ["a", HOSTILE, "c"], 2, board=HOSTILE).play(ends=False)
    run.watcher.see(MessageRejected(HOSTILE, HOSTILE))
    run.watcher.see(DeviceLeft(HOSTILE, HOSTILE))
    run.folder.append("samples.jsonl", {"round": 1, "prompt": HOSTILE, "text": HOSTILE})
    with served(run.path) as page:
        tab = Tab(browser)
        tab.page.goto(page.url)
        tab.page.wait_for_selector("#curves .scatterlayer .trace")

        assert tab.page.locator("img, main script, iframe, .card b, #curves a").count() == 0
        assert HOSTILE in tab.page.locator(".card h3").all_inner_texts()
        assert HOSTILE in tab.text("#events")
        assert HOSTILE in tab.text("#samples")
        assert HOSTILE in tab.text("#plan")
        assert "<img" in tab.text("#curves .legend")
        assert tab.errors == []
        assert tab.refused() == []


def test_it_comes_back_by_itself(browser: Any, tmp_path: Path) -> None:
    """When the page ends, that is said; when another one serves the same port, it goes on."""
    run = Recording(tmp_path, ["a", "b"], 2).play(ends=False)
    tab = Tab(browser)
    with served(run.path) as page:
        tab.page.goto(page.url)
        tab.page.wait_for_selector(".card")
    tab.wait("document.body.classList.contains('ended')")
    assert tab.text("#link") == "this page has ended with its run"
    run.watcher.see(DeviceLeft("a", "while nobody looked"))

    from coordinator.page.listening import listen
    from edge_sdk.transport.addresses import WebAddress

    with served(run.path, sock=listen(WebAddress("127.0.0.1", page.port), "page")):
        tab.wait("!document.body.classList.contains('ended')")
        tab.wait("document.querySelector('#events').textContent.includes('while nobody looked')")


def test_a_token_is_asked_for(browser: Any, runs: Path) -> None:
    """A browser without it gets the form, with it the page; scripts cannot read the cookie."""
    with served(runs / "three", TOKEN) as page:
        tab = Tab(browser)
        tab.page.goto(page.url)
        tab.page.fill("#token", TOKEN)
        tab.page.click("button[type=submit]")
        tab.page.wait_for_selector(".card")

        assert tab.page.evaluate("document.cookie") == ""
        assert tab.refused() == []


def test_one_of_several_runs_is_chosen(browser: Any, runs: Path) -> None:
    """The newest is shown first, and the others by a choice of their names."""
    with served(runs) as page:
        tab = Tab(browser)
        tab.page.goto(page.url)
        tab.page.wait_for_selector("#runs option >> nth=1", state="attached")
        tab.page.select_option("#runs", "three")

        tab.wait("document.title.startsWith('three')")
