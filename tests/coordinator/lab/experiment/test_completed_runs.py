"""What lies in the folder of results: which runs count, and what may be removed."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.experiment.completed_runs import digest, is_complete, make_room
from coordinator.lab.experiment.config import BoardConfig, ExperimentConfig, ExperimentSection
from coordinator.lab.experiment.testbed import run_experiment
from edge_sdk.errors import ConfigError


def config(**settings: Any) -> ExperimentConfig:
    """A run on one board that is nowhere."""
    return ExperimentConfig(model="m", boards={"a": BoardConfig(ssh="nobody@nowhere")}, **settings)


def keep(folder: Path, **facts: Any) -> Path:
    """Write the facts of a run."""
    folder.mkdir(parents=True)
    (folder / "boards.json").write_text(json.dumps(facts))
    return folder


def test_a_run_counts_with_the_same_settings_only(tmp_path: Path) -> None:
    """A run of other settings, one that was stopped, and one of an older version do not."""
    own = config(rounds=20)
    done = keep(tmp_path / "done", outcome="completed", digest=digest(own))
    stopped = keep(tmp_path / "stopped", outcome="interrupted", digest=digest(own))
    old = keep(tmp_path / "old", outcome="completed")

    assert is_complete(done, own)
    assert not is_complete(done, config(rounds=2))
    assert [is_complete(folder, own) for folder in (stopped, old, tmp_path)] == [False] * 3


def test_other_methods_and_folders_make_no_difference(tmp_path: Path) -> None:
    """A method that is added later does not have the others run again."""
    more = ExperimentSection(presets=("splitlora",), seeds=(1, 2), target=3.0)

    assert digest(config(experiment=more, runs=tmp_path, name="x")) == digest(config())


def test_other_data_is_another_run(tmp_path: Path) -> None:
    """What counts is the content of a board's file."""
    data, own = tmp_path / "a.jsonl", config()
    own = replace(own, boards={"a": replace(own.boards["a"], data=str(data))})
    found = []
    for text in ("one", "two", "one"):
        data.write_text(text)
        found.append(digest(own))

    assert found[0] == found[2] != found[1]


def test_only_our_folders_are_removed(tmp_path: Path) -> None:
    """A former run is; a folder of somebody's stays, and is named."""
    make_room(tmp_path / "nothing")
    make_room(keep(tmp_path / "run", outcome="interrupted"))
    precious = tmp_path / "data"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")

    with pytest.raises(ConfigError, match="data is in the way and is not a run"):
        make_room(precious)

    assert not (tmp_path / "run").exists()
    assert (precious / "thesis.txt").read_text() == "years"


def test_it_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    """The folder in the way is found before the board is, which is not there."""
    (tmp_path / "run").mkdir()

    with pytest.raises(ConfigError, match="run is in the way"):
        run_experiment(config(), {"run": config()}, tmp_path, print, threading.Event())


def test_a_complete_run_needs_no_boards(tmp_path: Path) -> None:
    """Nothing is prepared for it."""
    keep(tmp_path / "run", outcome="completed", digest=digest(config()))

    ended = run_experiment(config(), {"run": config()}, tmp_path, print, threading.Event())

    assert ended == {"run": "completed"}
