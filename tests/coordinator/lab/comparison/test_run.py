"""Comparing methods: each run is the one it says, on the same data; the report holds it all."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.cli import main
from coordinator.engine.server_model import ServerModel
from coordinator.lab.centralised.run import train_pooled
from coordinator.lab.centralised.trainer import load_pooled
from coordinator.lab.comparison.cells import RunResult
from coordinator.lab.comparison.config import (
    CompareConfig,
    CompareSection,
    load_compare,
    load_methods,
)
from coordinator.lab.comparison.fit_devices import whole_situation
from coordinator.lab.comparison.report import write_report
from coordinator.lab.comparison.run import compare
from coordinator.lab.simulation.clock import Costs, central_step_s
from coordinator.lab.simulation.config import SimulationConfig
from coordinator.lab.simulation.fleet import make_fleet
from coordinator.lab.simulation.run import simulate
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from edge_sdk.errors import ConfigError
from tests.e2e.cluster import save_model, sentences, write_rows
from tests.tiny import BLOCKS

# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PRESETS = ["hsplitlora", "splitlora", "ours", "ft"]
ROWS = [*PRESETS, "local", "cenlora"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a file that compares four methods on three devices."""
    folder = tmp_path_factory.mktemp("compare")
    save_model("llama", folder / "model")
    write_rows(folder / "train.jsonl", sentences(1, 40))
    write_rows(folder / "dev.jsonl", sentences(2, 6))
    config = {
        "model": str(folder / "model"),
        "rounds": 2,
        "steps_per_round": 1,
        "max_length": 32,
        "default": {"batch_size": 4, "codec": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "planning": {"rank_set": [2, 4], "importance_every": 1},
        "training": {"learning_rate": 1e-2},
        "evaluation": {"data": {"path": str(folder / "dev.jsonl")}},
        "device": "cpu",
        "simulation": {
            "data": {"path": str(folder / "train.jsonl")},
            "cache": str(folder / "parts"),
            "shards": "dirichlet",
            "devices": {
                "big": {"board": "agx-orin-32gb", "link": "lan-1g"},
                "small": {"board": "orin-nano-4gb", "count": 2},
            },
        },
        "compare": {
            "presets": PRESETS,
            "methods": {"ours": {"settings": ["aggregation=stack", "devices.big.split=2"]}},
            "device_sets": ["heterogeneous"],
            "disturbances": [],
            "learning_rate_search": {"most_trials": 0},
        },
    }
    (folder / "compare.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[CompareConfig, dict[str, SimulationConfig]]:
    """The comparison and the run of each method."""
    config = load_compare(folder / "compare.json")
    return config, load_methods(config, folder / "compare.json")


@pytest.fixture(scope="module")
def cells(folder: Path, loaded: Any) -> dict[str, RunResult]:
    """The comparison's runs by method."""
    told: list[str] = []
    found = compare(*loaded, folder / "out", told.append, simulate)
    assert len(told) == len(found) == len(ROWS)
    assert told[0].startswith("run 1 of 6: hsplitlora, heterogeneous, seed 0, rate 0.01: loss ")
    return {cell.method: cell for cell in found}


def run_folder(folder: Path, method: str) -> RunFolder:
    """Where the comparison ran a method."""
    found = sorted((folder / "out" / "runs").glob(f"{method}-*"), key=lambda p: p.stat().st_mtime)
    return RunFolder(found[0])


def test_a_cell_is_the_simulation_it_names(
    folder: Path, loaded: Any, cells: dict[str, RunResult], tmp_path: Path
) -> None:
    """The same bytes of metrics and clock as a simulation of that method alone."""
    method = "hsplitlora"
    ours = run_folder(folder, method)

    alone = simulate(replace(loaded[1][method], runs=tmp_path, name="alone"), Watchers())

    for name in ("metrics.jsonl", "clock.jsonl"):
        assert (ours.path / name).read_bytes() == (alone.folder.path / name).read_bytes()
    points = [(p.samples, p.modelled_s, p.bytes_up, p.loss) for p in cells[method].points]
    assert points == [(r.samples, r.seconds, r.bytes_up, r.loss) for r in alone.rounds]
    for held, round_ in zip(cells[method].held, alone.rounds[1:], strict=True):
        assert {d: h.split for d, h in held.items()} == {
            d: plan.split for d, plan in round_.plans.items()
        }
    assert not ours.checkpoints()


def test_methods_without_devices_train_on_the_same_rows(
    folder: Path, loaded: Any, cells: dict[str, RunResult], tmp_path: Path
) -> None:
    """The shards joined are the training file; the time is that of the coordinator's machine."""
    run = loaded[1]["ft"]
    files = sorted((folder / "out" / "data" / "seed-0").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert sorted(map(str, rows)) == sorted(map(str, train))
    assert [file.stem for file in files] == ["big", "small-0", "small-1"]

    pooled = replace(run.pooled, files=tuple(map(str, files)), batch_size=12)
    config = replace(run, pooled=pooled, runs=tmp_path).serve_config()
    result = train_pooled(config, durable=False)

    assert [point.loss for point in cells["ft"].points] == [r["eval"]["loss"] for r in result.rows]
    assert cells["ft"].last.samples == 24 == cells["hsplitlora"].last.samples
    costs = Costs(whole_situation(run).model, BLOCKS)
    machine = make_fleet(run.simulation, run.planning).coordinator
    work = [
        3 * costs.flops(0, BLOCKS, {}, count, length, front=True, tail=True).forward
        for step in result.shapes
        for count, length, _ in step
    ]
    assert cells["ft"].last.modelled_s == pytest.approx(central_step_s(sum(work), machine))
    assert len(load_pooled(config, ServerModel(config), None)[0]) == 40


def test_importance_is_kept_round_by_round(cells: dict[str, RunResult], loaded: Any) -> None:
    """Where it is measured, for every adapted weight; elsewhere there is none."""
    rounds = [round_ for round_, _ in cells["hsplitlora"].importance]

    assert rounds == [1, 2]
    names = set(whole_situation(loaded[1]["hsplitlora"]).facts.targets)
    assert all(set(values) == names for _, values in cells["hsplitlora"].importance)
    assert cells["splitlora"].importance == ()


def test_what_has_run_is_not_run_again(
    folder: Path, loaded: Any, cells: dict[str, RunResult]
) -> None:
    """A second comparison finds all cells, also when it is called from another folder.

    To a method without devices all devices are alike.
    """
    wanted = replace(loaded[0].compare, device_sets=("heterogeneous",))
    places: dict[str, Any] = {n: Path("elsewhere", n) for n in ("secret_key", "allow_list", "runs")}
    config = replace(loaded[0], compare=wanted, **places)
    methods = {name: replace(method, **places) for name, method in loaded[1].items()}
    told: list[str] = []

    again = compare(config, methods, folder / "out", told.append, simulate)
    alike = replace(config, compare=replace(config.compare, device_sets=("homogeneous",)))
    (pooled,) = compare(alike, {"ft": loaded[1]["ft"]}, folder / "out", told.append, simulate)

    assert {cell.method: cell for cell in again} == cells
    assert pooled == replace(cells["ft"], device_set="homogeneous")
    assert told == [
        "6 of 6 runs were there already",
        "changed since the last call: compare.device_sets: ['heterogeneous'] -> ['homogeneous']; "
        "runs that this concerns begin anew",
        "1 of 1 runs was there already",
    ]


def test_an_interrupted_comparison_goes_on_where_it_was(
    folder: Path, loaded: Any, cells: dict[str, RunResult]
) -> None:
    """Runs that had ended are not run again, and all is as if nothing had happened."""
    wanted = replace(loaded[0].compare, disturbances=("dropouts",))
    config = replace(loaded[0], compare=wanted)
    methods = {name: loaded[1][name] for name in ("ft", "splitlora")}
    told: list[str] = []

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, methods, folder / "cut", told.append, stopped)
    assert len((folder / "cut" / "cells.jsonl").read_text().splitlines()) == 1

    *whole, disturbed = compare(config, methods, folder / "cut", told.append, simulate)

    assert list(map(timeless, whole)) == [timeless(cells[name]) for name in ("ft", "splitlora")]
    assert [line.split(": loss")[0] for line in told] == [
        "run 1 of 3: ft, heterogeneous, seed 0, rate 0.01",
        "1 of 3 runs was there already",
        "run 2 of 3: splitlora, heterogeneous, seed 0, rate 0.01",
        "run 3 of 3: splitlora, heterogeneous, seed 0, rate 0.01, dropouts",
    ]
    # The device that left had trained a step of the first round, and not given it away.
    assert (disturbed.disturbance, len(disturbed.disturbed)) == ("dropouts", 1)
    assert (disturbed.last.samples, disturbed.points[0]) == (16, whole[1].points[0])


def timeless(cell: RunResult) -> RunResult:
    """A run without the time that it took here."""
    return replace(cell, points=tuple(point._replace(real_s=0.0) for point in cell.points))


def test_devices_alone_are_runs_of_one_machine_each(
    folder: Path, loaded: Any, cells: dict[str, RunResult], tmp_path: Path
) -> None:
    """The mean over centralised runs on each device's own shard; nothing travels."""
    files = sorted((folder / "out" / "data" / "seed-0").glob("*.jsonl"))
    run, losses = loaded[1]["cenlora"], []
    for file in files:
        pooled = replace(run.pooled, files=(str(file),), batch_size=4)
        config = replace(run, pooled=pooled, runs=tmp_path, name=file.stem).serve_config()
        losses.append([row["eval"]["loss"] for row in train_pooled(config, durable=False).rows])

    local = cells["local"]
    assert [p.loss for p in local.points] == pytest.approx(
        [sum(each) / len(files) for each in zip(*losses, strict=True)]
    )
    assert (local.last.samples, local.last.traffic_bytes) == (24, 0)
    assert local.last.energy_j > 0
    assert local.peak_bytes is not None
    assert sorted(local.peak_bytes) == [file.stem for file in files]


def test_devices_too_small_for_the_model_are_not_run_alone(
    folder: Path, cells: dict[str, RunResult], tmp_path: Path
) -> None:
    """The comparison goes on without that row, and says so."""
    file, told = folder / "compare.json", []
    small = [f"simulation.devices.{name}.memory_bytes=18.2e6" for name in ("big", "small")]
    told_all = [*small, "simulation.overhead_bytes=0", "planning.memory_margin=0"]
    config = load_compare(file, told_all)
    alone = {"local": load_methods(config, file, told_all)["local"]}

    assert compare(config, alone, tmp_path, told.append, simulate) == []

    assert told[0].startswith("run 1 of 1: local, heterogeneous: it cannot run on any device: ")
    write_report(config, [cells["cenlora"], cells["splitlora"]], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "There is no row of devices alone among the heterogeneous ones" in page


def test_drawn_rounds_are_compared_at_the_same_number_of_samples(
    folder: Path, tmp_path: Path
) -> None:
    """Two of three devices a round: neither one machine nor devices alone train on more."""
    file, told = folder / "compare.json", ["devices_per_round=2", "rounds=3"]
    config = load_compare(file, told)
    methods = load_methods(config, file, told)
    wanted = {name: methods[name] for name in ("splitlora", "local", "cenlora")}

    cells = compare(config, wanted, tmp_path, lambda _: None, simulate)

    assert {cell.method: cell.last.samples for cell in cells} == dict.fromkeys(wanted, 3 * 2 * 4)
    (held,) = [cell.held for cell in cells if cell.method == "splitlora"]
    assert len(held) == 3


def test_methods_are_on_equal_terms(folder: Path, loaded: Any) -> None:
    """All keep their labels on devices; presets have theirs where that is asked for."""
    file = folder / "compare.json"

    assert {run.labels for run in loaded[1].values()} == {"device"}
    published = load_compare(file, ["compare.labels=published"])
    assert load_methods(published, file)["splitlora"].labels == "server"
    assert load_methods(published, file)["hsplitlora"].labels == "device"
    served = load_compare(file, ["labels=server", "compare.presets=[splitlora,hsplitlora,hlora]"])
    found = load_methods(served, file, ["labels=server"])
    assert {name: run.labels for name, run in found.items() if name in served.compare.presets} == {
        "splitlora": "server",
        "hsplitlora": "server",
        "hlora": "device",
    }
    told = ["compare.presets=[mine]", 'compare.methods.mine={settings: ["labels=server"]}']
    own = load_methods(load_compare(file, told), file, told)
    assert own["mine"].labels == "server"


def test_the_command_writes_one_page_that_needs_nothing_else(
    folder: Path, cells: dict[str, RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each method, every picture inside and beside it, a table for Markdown."""
    out = folder / "out"

    assert main(["compare", "--config", str(folder / "compare.json"), "--out", str(out)]) == 0

    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = sorted(out.glob("*.png"))
    inside = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert {path.stem for path in pictures} == {
        "differences",
        "importance",
        "loss-bytes",
        "loss-samples",
        "loss-time",
        "splits-ranks",
    }
    assert {base64.b64decode(data) for data in inside} == {path.read_bytes() for path in pictures}
    assert all(path.read_bytes().startswith(PNG) for path in pictures)
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', page)
    assert re.findall(r"<tr><td>(.*?)</td>", page)[: len(ROWS)] == ROWS
    table = (out / "table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {m}" for m in ROWS]
    shown = capsys.readouterr().out
    assert "|" not in shown
    tables_shown = shown[shown.index("Results") : shown.index("Not settled")]
    assert max(map(len, tables_shown.splitlines())) <= 100
    (line,) = (line for line in shown.splitlines() if "0.01 is the only learning rate" in line)
    assert line.lstrip().startswith("hsplitlora, ")
    tables = ["cost-to-target", "differences", "learning-rates", "quality-under-budget", "ranking"]
    names = [*tables, "table", "traffic"]
    for kind in ("md", "csv", "tex"):
        assert sorted(path.stem for path in out.glob(f"*.{kind}")) == names
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert [row["method"] for row in rows] == ROWS
    assert [float(row["loss"]) for row in rows] == [cells[m].last.loss for m in ROWS]
    assert float(rows[0]["loss_before"]) == cells["hsplitlora"].points[0].loss
    traffic = list(csv.DictReader((out / "traffic.csv").open(encoding="utf-8")))
    assert [float(row["up_bytes"]) for row in traffic] == [
        cells[row["method"]].last.bytes_up for row in traffic
    ]


def test_flags_choose_methods_rates_and_seeds(folder: Path, tmp_path: Path) -> None:
    """Every method tries each rate on the first seed; the best of them runs the others."""
    flags = ["--presets", "cenlora", "--rates", "1e-2", "1e-5", "--seeds", "3", "4"]
    plain = ["rounds=1", "compare.references=[]"]
    file = str(folder / "compare.json")

    assert main(["compare", *plain, "--config", file, "--out", str(tmp_path), *flags]) == 0

    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(row["method"], row["seed"], row["rate"]) for row in rows] == [
        ("cenlora", 3, 1e-2),
        ("cenlora", 3, 1e-5),
        ("cenlora", 4, 1e-2),
    ]
    assert "1e-05, 0.01" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_search_goes_on_until_the_best_rate_is_inside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond rates that diverge and rates too small; a second call repeats no trial of it."""
    settings = [
        "compare.references=[]",
        "compare.learning_rate_search={most_trials: 6, factor: 20}",
    ]
    command = ["compare", *settings, "--config", str(folder / "compare.json")]
    command += ["--out", str(tmp_path), "--presets", "splitlora", "--rates", "100", "500"]

    assert main(command) == 0

    said = capsys.readouterr().out
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    losses = {cell["rate"]: cell["points"][-1][5] for cell in cells}
    assert list(losses)[:4] == [100.0, 500.0, 5.0, 0.25]
    assert losses[500.0] is None
    assert "run 2 of at least 2: splitlora, heterogeneous, seed 0, rate 500: it diverged; " in said
    (row,) = csv.DictReader((tmp_path / "learning-rates.csv").open(encoding="utf-8"))
    assert (row["settled"], float(row["tried"])) == ("1", len(losses))
    assert float(row["lower_rate"]) < float(row["learning_rate"]) < float(row["higher_rate"])
    assert float(row["loss"]) == min(loss for loss in losses.values() if loss is not None)
    assert "Not settled" not in said
    assert (tmp_path / "learning-rates.svg").is_file()
    assert not list(tmp_path.glob("runs/*/checkpoint*"))
    rows = (tmp_path / "learning-rates.csv").read_bytes()
    assert main(command) == 0
    assert f"{len(losses)} of {len(losses)} runs were there already" in capsys.readouterr().out
    assert (tmp_path / "learning-rates.csv").read_bytes() == rows
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == len(losses)


def test_one_cut_for_all_is_where_the_shallowest_was(
    folder: Path, cells: dict[str, RunResult], tmp_path: Path
) -> None:
    """Only methods with several cuts are run so; all else of them stays as it is."""
    file = folder / "compare.json"
    told = ["compare.device_sets=[one-cut]", "compare.presets=[ours,splitlora]"]
    told += ["compare.references=[]"]
    config = load_compare(file, told)

    (one,) = compare(config, load_methods(config, file, told), tmp_path, [].append, simulate)

    mixed = [{name: h.split for name, h in held.items()} for held in cells["ours"].held]
    assert len(set(mixed[0].values())) > 1
    least = min(mixed[0].values())
    assert [{name: h.split for name, h in held.items()} for held in one.held] == [
        dict.fromkeys(own, least) for own in mixed
    ]
    assert (one.method, one.device_set) == ("ours", "one-cut")
    assert one.last.samples == cells["ours"].last.samples


def test_a_sweep_is_a_comparison_for_each_value(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is that of its own overrides; the energy of dW is that of the adapters they export."""
    told = ["compare.presets=[ours]", "compare.references=[]", "compare.steps=4"]
    told += ["evaluation.rank_energy=true"]
    file = folder / "compare.json"
    command = ["compare", *told, "--config", str(file), "--out", str(tmp_path)]
    command += ["--sweep", "steps_per_round=2,4", "--sweep", "simulation.num_devices=4,2"]

    assert main(command) == 0

    said = capsys.readouterr().out
    assert "run 1 of 4: steps_per_round 2, num_devices 4: ours, heterogeneous, seed 0" in said
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open(encoding="utf-8")))
    keys = [(row["steps_per_round"], row["simulation.num_devices"]) for row in rows]
    assert keys == [("2", "4"), ("2", "2"), ("4", "4"), ("4", "2")]
    assert [float(row["samples"]) for row in rows] == [64, 32, 64, 32]
    assert {path.stem for path in tmp_path.glob("*.svg")} == {
        "rank-energy",
        "sweep-num_devices",
        "sweep-steps_per_round",
    }
    point = tmp_path / "steps_per_round=2,num_devices=2"
    alone = load_compare(file, [*told, "steps_per_round=2", "simulation.num_devices=2"])
    methods = load_methods(alone, file, [*told, "steps_per_round=2", "simulation.num_devices=2"])
    (cell,) = compare(alone, methods, point, [].append, simulate)
    assert str(cell.last.loss) == rows[1]["loss"]
    assert [round_ for round_, _ in cell.rank_energy] == [1, 2]
    (run,) = (point / "runs").iterdir()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    energy = np.zeros(64)
    for name, a_RI in adapter.items():
        if "lora_A" in name:
            dense = adapter[name.replace("lora_A", "lora_B")] @ a_RI
            values = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
            energy[: len(values)] += values**2
    shares = cell.rank_energy[-1][1]
    within = [float(energy[: 2**at].sum() / energy.sum()) for at in range(len(shares))]
    assert shares == pytest.approx(within, abs=1e-5)


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown methods, a preset of the file's own, nothing to evaluate, devices too small."""
    with pytest.raises(ValueError, match=r"presets: 'x' is unknown; there are hsplitlora, "):
        CompareSection(presets=("x",))
    with pytest.raises(ValueError, match="seeds must hold different entries"):
        CompareSection(seeds=(1, 1))
    with pytest.raises(ValueError, match="learning_rates must be different"):
        CompareSection(learning_rates=(0.1, 0.1))
    with pytest.raises(ValueError, match="reference: 'hlra' is no row; there are hsplitlora, "):
        CompareSection(reference="hlra")
    with pytest.raises(ValueError, match="learning_rates must be above 0"):
        CompareSection(learning_rates=(0.0,))
    file = folder / "compare.json"
    with pytest.raises(ConfigError, match="preset: a comparison names its presets"):
        load_compare(file, ["preset=ft"])
    config = load_compare(file, ["compare.presets=[hlora]"])
    with pytest.raises(ConfigError, match="aggregation must be 'svd'"):
        load_methods(config, file, ["aggregation=exact"])
    command = ["compare", "--config", str(file), "--out", str(tmp_path)]
    assert main([*command, "evaluation.data.path=null", "--presets", "cenlora"]) == 2
    assert "comparison needs one of them" in capsys.readouterr().err
    small = [f"simulation.devices.{d}.memory_bytes=6e8" for d in ("big", "small")]
    assert main([*command, *small, "--presets", "fedlora"]) == 2
    error = capsys.readouterr().err
    assert "fedlora, heterogeneous devices: it cannot run on any device: 5 of 5 blocks" in error
    assert len(error.splitlines()) == 1


def test_without_matplotlib_nothing_is_trained(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says what to install, before the first run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    file = str(folder / "compare.json")
    assert main(["compare", "--config", file, "--out", str(tmp_path)]) == 2

    assert "pip install 'edgesplit[coordinator]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
