"""The live view, on boards, with its output caught."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from profiler.live_view import watch
from tests.boards import Standing, build


def test_a_view_has_a_line_for_each_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value, a bar for what has an end, and extremes; unknown is said."""
    standing = build("orin_nano_jp6", tmp_path)

    watch(count=1, interval_s=1.0, as_json=False, sources=standing.sources, sleep=lambda _s: None)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("Developer Kit Super, power mode 25W")
    by_name = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert by_name["temperature"][1:] == ["52.9", "C", *["52.9", "C"] * 3]
    assert by_name["gpu_clock"][1:4] == ["612", "MHz", "#" * 8 + "." * 4]
    assert by_name["cpu_load"][1:] == ["unknown"]
    assert by_name["no"] == ["no", "events"]


def test_what_happens_while_it_watches_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of JSON for each sample, with the events since the last one."""
    standing: Standing = build("orin_nano_jp6", tmp_path)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            standing.write({"var/lib/nvpmodel/status": "pmode:0000\n"})

    watch(count=3, interval_s=0.5, as_json=True, sources=standing.sources, sleep=sleep)

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    changed = {"kind": "power_mode_changed", "text": "power mode is 15W, was 25W"}
    assert [row["events"] for row in rows] == [[], [changed], []]
    assert slept == [0.5, 0.5, 0.5]
    assert rows[0]["readings"]["power"]["value"] == pytest.approx(11.9232)
    assert rows[0]["readings"]["cpu_load"]["value"] is None
    assert rows[0]["throttled"] is False


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_terminal_is_drawn_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_rich: bool,
) -> None:
    """Without a count a terminal is drawn over, with rich or without, until Ctrl-C."""
    standing = build("raspberry_pi_5", tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if has_rich:
        pytest.importorskip("rich.live")
        monkeypatch.setenv("TERM", "xterm")
    else:
        monkeypatch.setitem(sys.modules, "rich.live", None)
    left = iter([None, None])

    def sleep(_seconds: float) -> None:
        if next(left, "over") == "over":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(count=None, interval_s=1.0, as_json=False, sources=standing.sources, sleep=sleep)

    out = capsys.readouterr().out
    assert out.count("Raspberry Pi 5 Model B") >= 2
    assert "80.7 C" in out
    assert "\x1b[" in out
