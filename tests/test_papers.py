"""The recipes of published experiments: each loads in full, says what it needs, and runs tiny."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.lab.comparison.config import load_compare, load_methods
from coordinator.lab.comparison.published.config import NeededData, PaperSection
from coordinator.lab.comparison.published.recipe import read_paper, recipe_overrides
from coordinator.lab.comparison.report import write_report
from coordinator.lab.comparison.run import compare
from coordinator.lab.simulation.run import simulate
from edge_sdk.errors import ConfigError

# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "papers"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# One step of two samples on the last set of devices: that it runs, not what it learns.
SHORTEST = [
    "compare.steps=1",
    "steps_per_round=1",
    "default.batch_size=2",
    "evaluation.data.limit=2",
    "max_length=160",
    "compare.references=[]",
]
# The methods that differ by more than a number; of every other recipe it is the first one.
METHODS = {
    "hetlora.yaml": ["hetlora", "lowest-rank"],
    "hlora-rte.yaml": ["hlora", "naive", "exact"],
    "hsplitlora-gpt2-l.yaml": ["without-iwi", "without-armsc", "without-naa", "hetlora"],
    "splitft.yaml": ["cut-2", "no-cut"],
    "splitlite-rte.yaml": ["splitlora", "exact-changes"],
    "splitlora-gpt2-s.yaml": ["splitlora-r4", "cenlora-r4", "fedlora-r4"],
}


def paper_of(name: str) -> PaperSection:
    """The section `paper` of a recipe."""
    paper = read_paper(FOLDER / name)
    assert paper is not None
    return paper


def make_files(data: NeededData, folder: Path) -> None:
    """Lay empty files where a recipe looks for its data."""
    for name in data.files.values():
        if name != ".":
            (folder / name).touch()


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the recipes' paths begin


def test_there_is_a_recipe_for_each_experiment() -> None:
    """Those that docs/papers.md has in its table, and no other."""
    page = (ROOT / "docs" / "papers.md").read_text("utf-8")

    assert sorted(re.findall(r"^\| \[`([\w-]+\.yaml)`\]", page, re.MULTILINE)) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_the_full_experiment_is_valid_without_its_model(name: str, tmp_path: Path) -> None:
    """Every method loads once the data lies there, and what it needs is named before that."""
    data = paper_of(name).data
    assert data is not None
    with pytest.raises(ConfigError, match=re.escape(data.title)):
        recipe_overrides(FOLDER / name, [])
    make_files(data, tmp_path)

    told = recipe_overrides(FOLDER / name, [f"data={tmp_path}"])
    config = load_compare(FOLDER / name, told)
    methods = load_methods(config, FOLDER / name, told)

    assert {*config.compare.presets} <= methods.keys()
    assert config.evaluation.data.path is not None
    assert config.simulation.data.path is not None


@pytest.mark.parametrize("name", RECIPES)
def test_the_tiny_experiment_keeps_devices_and_methods(name: str, tmp_path: Path) -> None:
    """Shards, kinds of devices and their ranks are the paper's; model and data are ours."""
    data = paper_of(name).data
    assert data is not None
    make_files(data, tmp_path)
    full = load_compare(FOLDER / name, recipe_overrides(FOLDER / name, [f"data={tmp_path}"]))
    tiny = load_compare(FOLDER / name, recipe_overrides(FOLDER / name, [], "tiny"))

    assert tiny.simulation.shards == full.simulation.shards
    assert tiny.simulation.alpha == full.simulation.alpha
    assert tiny.simulation.devices.keys() == full.simulation.devices.keys()
    assert tiny.planning.rank_set == full.planning.rank_set
    assert tiny.lora.r == full.lora.r
    assert {s.r for s in tiny.devices.values()} == {s.r for s in full.devices.values()}
    assert tiny.compare.device_sets == full.compare.device_sets
    assert set(tiny.compare.presets) <= set(full.compare.presets)
    assert tiny.model == "examples/base"
    assert tiny.evaluation.data.path is not None
    assert str(tiny.evaluation.data.path).startswith("examples/data/")


@pytest.mark.parametrize("name", RECIPES)
def test_the_tiny_experiment_runs(name: str, tmp_path: Path) -> None:
    """Its kinds of methods, to a report in which the paper's numbers are marked as theirs."""
    told = [*recipe_overrides(FOLDER / name, SHORTEST, "tiny"), f"simulation.cache={tmp_path}"]
    wanted = load_compare(FOLDER / name, told).compare
    presets = METHODS.get(name, [wanted.presets[0]])
    told += [
        f"compare.presets=[{', '.join(presets)}]",
        f"compare.reference={presets[0]}",
        f"compare.device_sets=[{wanted.device_sets[-1]}]",
    ]
    config = load_compare(FOLDER / name, told)

    methods = load_methods(config, FOLDER / name, told)
    cells = compare(config, methods, tmp_path, lambda _: None, simulate)

    assert [cell.method for cell in cells] == presets
    assert all(cell.last.loss > 0 for cell in cells)
    if name == "splitlora-gpt2-s.yaml":
        table = write_report(config, cells, tmp_path)[0]
        assert "splitlora-r4 (as published)" in [row[0] for row in table.texts]
        page = (tmp_path / "report.html").read_text("utf-8")
        assert "Scale tiny: these runs train another, smaller model" in page
        assert re.search(r'<tr class="theirs"><td>splitlora-r4 \(as published\)</td>', page)
        assert "68.79" in page


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """One line names data, license, place and files, and nothing has begun."""
    code = main(["compare", str(FOLDER / "splitlora-gpt2-m.yaml"), "model=examples/base"])

    line = capsys.readouterr().err
    assert code == 2
    assert line.count("\n") == 1
    assert "E2E NLG challenge (CC BY-SA 4.0)" in line
    assert "put trainset.csv, testset_w_refs.csv into one folder, and add data=FOLDER" in line


def test_two_files_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison has one, with --config or without."""
    code = main(["compare", "a.yaml", "--config", "b.yaml"])

    assert (code, capsys.readouterr().err) == (
        2,
        "coordinator: a comparison has one file, got b.yaml, a.yaml\n",
    )
