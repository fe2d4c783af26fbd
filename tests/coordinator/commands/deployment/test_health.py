"""`coordinator health` says by its exit code whether devices can connect, and why not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import cli
from coordinator.config.presets import load_serve_config
from coordinator.results.events.run import Listening
from coordinator.results.lifecycle import new_folder
from coordinator.results.standing.live_file import LiveFile
from edge_sdk.errors import ConfigError
from tests.e2e.programs import write_yaml


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run called `first`."""
    return write_yaml(tmp_path / "run.yaml", {"model": "m", "runs": "runs", "name": "first"})


@pytest.fixture
def run(config: Path) -> Iterator[Path]:
    """The folder of a run that is held, and listens."""
    with new_folder(load_serve_config(config, env={})) as folder:
        LiveFile().see(Listening(folder.path, "tcp://*:1"))
        yield folder.path


def health(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return exit code and line of the command."""
    code = cli.main(["health", *words])
    return code, capsys.readouterr().out.strip()


def test_a_run_that_listens_is_well(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder, by its config, and by a config whose run has no name: the one that is held."""
    nameless = write_yaml(config.with_name("other.yaml"), {"model": "m", "runs": "runs"})
    well = (0, f"{run}: well")

    assert health(capsys, str(run)) == well
    assert health(capsys, "--config", str(config)) == well
    assert health(capsys, "--config", str(nameless)) == well


def test_a_loop_that_stands_still_is_not_well(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it is asked; the time that is allowed can be given."""
    before = (run / "live.json").stat().st_mtime - 100
    os.utime(run / "live.json", (before, before))

    for more in ([], ["--live"]):
        code, line = health(capsys, str(run), *more)
        assert (code, "has not turned for 100 s" in line) == (1, True)
    assert health(capsys, str(run), "--within", "200")[0] == 0


def test_a_run_that_nobody_holds_is_not_well(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one that has not been begun: both are 1, which is all that Docker wants to know."""
    assert health(capsys, "--config", str(config))[0] == 1
    with new_folder(load_serve_config(config, env={})) as folder:
        starting = health(capsys, str(folder.path)), health(capsys, str(folder.path), "--live")
        (folder.path / "checkpoint-000001").mkdir()  # it stays when it is left

    assert [code for code, _ in starting] == [1, 0]
    assert health(capsys, str(folder.path)) == (1, f"{folder.path}: no coordinator holds it")


@pytest.mark.parametrize("words", [[], ["runs/first", "--config", "run.yaml"]])
def test_one_of_folder_and_config_is_asked_for(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither and both are wrong."""
    assert health(capsys, *words)[0] == ConfigError.exit_code
