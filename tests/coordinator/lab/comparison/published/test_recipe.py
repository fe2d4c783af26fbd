"""A recipe becomes settings; what is missing is said before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.comparison.config import CompareConfig
from coordinator.lab.comparison.published.recipe import (
    read_paper,
    recipe_overrides,
    require_model,
)
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig
from edge_sdk.errors import ConfigError

PAPER: dict[str, Any] = {
    "title": "A Paper",
    "source": "arXiv 0000.00000",
    "data": {
        "title": "Some Data",
        "license": "CC BY 4.0",
        "origin": "https://example.org/data",
        "files": {"simulation.data.path": "train.csv", "evaluation.data.path": "dev.csv"},
    },
    "scales": {"tiny": ["model=small", "simulation.data.path=a", "evaluation.data.path=b"]},
}
WANTED = "Some Data (CC BY 4.0): fetch it from https://example.org/data; put train.csv, dev.csv"


def write(folder: Path, paper: dict[str, Any] | None) -> Path:
    """A file with that section."""
    file = folder / "paper.yaml"
    file.write_text(json.dumps({"model": "large", **({"paper": paper} if paper else {})}))
    return file


def test_data_names_every_file_in_the_folder(tmp_path: Path) -> None:
    """`data=FOLDER` is spelled out as the settings that read it; what else is said stays."""
    file = write(tmp_path, PAPER)
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).touch()

    assert recipe_overrides(file, [f"data={tmp_path}", "rounds=3"]) == [
        f"simulation.data.path={tmp_path / 'train.csv'}",
        f"evaluation.data.path={tmp_path / 'dev.csv'}",
        "rounds=3",
    ]


def test_a_hub_id_is_passed_on_whole(tmp_path: Path) -> None:
    """Where the recipe needs the folder itself, an id will do: who reads it knows the hub."""
    needed = {**PAPER["data"], "files": {"simulation.data.path": "."}}
    file = write(tmp_path, {**PAPER, "data": needed})

    assert recipe_overrides(file, ["data=owner/set"]) == ["simulation.data.path=owner/set"]


def test_without_data_a_line_says_what_to_fetch(tmp_path: Path) -> None:
    """Name, license and place of the data, its files, and where to put them."""
    file = write(tmp_path, PAPER)

    with pytest.raises(ConfigError, match=re.escape(f"{file} needs {WANTED} into one folder, and")):
        recipe_overrides(file, [])


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The files that are missing, not those that are there."""
    file = write(tmp_path, PAPER)
    (tmp_path / "train.csv").touch()

    with pytest.raises(ConfigError, match=re.escape(f"dev.csv not there; {WANTED}")):
        recipe_overrides(file, [f"data={tmp_path}"])


def test_files_of_ones_own_are_data_too(tmp_path: Path) -> None:
    """Who names each file need not put them into one folder."""
    own = ["simulation.data.path=a.csv", "evaluation.data.path=b.csv"]

    assert recipe_overrides(write(tmp_path, PAPER), own) == own


def test_a_scale_lies_under_what_is_said(tmp_path: Path) -> None:
    """It brings data and model of its own, and a later word wins over it."""
    assert recipe_overrides(write(tmp_path, PAPER), ["model=other"], "tiny") == [
        *PAPER["scales"]["tiny"],
        "paper.scale=tiny",
        "model=other",
    ]


@pytest.mark.parametrize(("paper", "known"), [(PAPER, "there are tiny"), (None, "it has none")])
def test_an_unknown_scale_is_refused(tmp_path: Path, paper: Any, known: str) -> None:
    """With those that there are."""
    with pytest.raises(ConfigError, match=f"--scale big: .* has no such scale; {known}"):
        recipe_overrides(write(tmp_path, paper), [], "big")


def test_a_comparison_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    """No section, no file: nothing is added, and `data` has no meaning here."""
    assert recipe_overrides(write(tmp_path, None), ["data=x"]) == ["data=x"]
    assert recipe_overrides(None, ["rounds=1"]) == ["rounds=1"]
    assert read_paper(None) is None


def test_a_wrong_section_is_refused_with_its_line(tmp_path: Path) -> None:
    """As any other part of a configuration."""
    file = write(tmp_path, {**PAPER, "titel": "x"})

    with pytest.raises(ConfigError, match=r"paper.yaml:1: .*paper\.titel"):
        recipe_overrides(file, [])


def test_a_model_that_is_not_there_is_said_with_the_way_to_get_it(tmp_path: Path) -> None:
    """One line: what is missing, how it is fetched, how it is named then."""
    fleet = FleetConfig(devices={"a": SimulatedDeviceConfig()})
    config = CompareConfig(model=str(tmp_path / "gone"), simulation=fleet)

    with pytest.raises(ConfigError, match=r"gone' does not exist; fetch it .*add model=FOLDER$"):
        require_model(config)
