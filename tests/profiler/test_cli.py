"""The `profiler` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edge_sdk.config.loader import load_config
from profiler import cli, measure
from profiler.profile import DeviceProfile
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import no_library
from tests.tiny import make_config

GROUPS = ["device", "memory", "compute", "power", "heat"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no longer than a test needs."""
    monkeypatch.setattr(cli, "LOAD_WINDOW_S", 0.0)
    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    monkeypatch.setattr(measure, "GEMM_ENOUGH_S", 0.0)


def test_show_prints_every_reading_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For people: groups of lines with value and source, and what is unknown at the end of each."""
    monkeypatch.setattr(cli, "HERE", build("agx_orin_jp5", tmp_path).sources)

    assert cli.main(["show"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == GROUPS
    words = [" ".join(line.split()) for line in lines]
    assert "power 11.7 W sum of 4 rails (estimate)" in words
    assert "power_mode MODE_50W /etc/nvpmodel.conf" in words
    assert "memory_total 62,828 MiB /proc/meminfo MemTotal" in words
    assert "unknown here gpu_power" in words


def test_show_as_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs: one JSON object of groups, values in base units."""
    assert cli.main(["show", "--format", "json"]) == 0

    groups = json.loads(capsys.readouterr().out)
    assert list(groups) == GROUPS
    assert groups["memory"]["process_rss"]["unit"] == "B"
    assert groups["memory"]["process_rss"]["value"] > 2**20
    assert groups["compute"]["cores"]["value"] > 0
    assert groups["device"]["python"]["value"].startswith("3.")


def test_what_is_not_known_is_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown reading is shown as unknown, and as null to programs."""
    monkeypatch.setattr(cli, "HERE", Sources(tmp_path, Nvml(no_library())))

    cli.main(["show"])
    text = capsys.readouterr().out
    cli.main(["show", "--format", "json"])

    assert "unknown here power, gpu_power" in " ".join(text.split())
    assert json.loads(capsys.readouterr().out)["memory"]["memory_total"]["value"] is None


def test_measure_times_products_and_a_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates, a block of the model in the folder, and the profile, as JSON or to read."""
    make_config("llama").save_pretrained(tmp_path)
    shape = ["--model", str(tmp_path), "--rows", "2", "--length", "8", "--device", "cpu"]

    assert cli.main(["measure", *shape, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = tmp_path / "board.json"
    by_hand = ["--memory-bytes", "1e8", "--device", "cpu", "--write", str(written)]
    assert cli.main(["measure", *by_hand]) == 0
    text = capsys.readouterr().out

    assert list(found["matrix products"]) == ["float32", "bfloat16", "float16"]
    block = found["one block, forward and backward"]
    assert block["operations"]["value"] == 540_672
    assert found["profile"]["flops_per_s"] == block["speed"]["value"]
    assert found["profile"]["up_bytes_per_s"] is None
    assert "memory_budget 95 MiB" in " ".join(text.split())
    assert load_config(DeviceProfile, written, env={}).memory_bytes == 1e8


def test_watch_ends_after_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts: so many views, or one."""
    assert cli.main(["watch", "--count", "2", "--interval", "0.01", "--format", "json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["watch", "--once", "--interval", "0.01"]) == 0
    assert capsys.readouterr().out.count("memory_available") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["watch", "--interval", "0"], "--interval must be above 0, got 0.0"),
        (["watch", "--interval", "nan"], "--interval must be above 0, got nan"),
        (["measure", "--memory-bytes", "1e18"], "memory_bytes is 1000000000000000000 "),
        (["measure", "--device", "cuda"], "--device cuda: torch finds no GPU that it can use"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and with what, on stderr."""
    if "cuda" in arguments and pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU here")

    assert cli.main(arguments) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"profiler: {text}")
    assert error.count("\n") == 1


def test_a_missing_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a board without torch nothing can be measured, and the line says what to install."""
    monkeypatch.setitem(sys.modules, "torch", None)

    assert cli.main(["measure"]) == 1

    error = capsys.readouterr().err
    assert "pip install 'edgesplit[torch]'" in error
    assert error.count("\n") == 1


def test_a_folder_without_a_model_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong --model is code 2 and names the folder."""
    assert cli.main(["measure", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("profiler: model: no config.json in ")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells expect."""

    def interrupted(_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_watch", interrupted)

    assert cli.main(["watch"]) == 130
