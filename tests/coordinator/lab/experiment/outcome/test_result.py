"""What a report says of a run follows from its files by arithmetic that is done here again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.experiment.config import BoardConfig, ExperimentConfig
from coordinator.lab.experiment.outcome.happening_tables import happening_table
from coordinator.lab.experiment.outcome.power_table import board_powers
from coordinator.lab.experiment.outcome.report import run_table, write_report
from coordinator.lab.experiment.outcome.result import read_run
from coordinator.lab.simulation.boards import catalogue
from coordinator.results.run_folder import RunFolder

DEVICES = {"a": (4.0, 1000), "b": (1.0, 600)}
"""Compute seconds and bytes up of each board in a round."""


def config(**settings: Any) -> ExperimentConfig:
    """An emulated board and a real one."""
    boards = {"a": BoardConfig(emulated="orin-nano-8gb"), "b": BoardConfig(ssh="me@board")}
    return ExperimentConfig(model="m", rounds=2, boards=boards, **settings)


def write_run(
    folder: Path,
    *,
    losses: tuple[float, ...] = (4.0, 3.0, 2.0),
    drawn: tuple[str, ...] = ("ab", "ab"),
) -> None:
    """A run of two rounds of 10 s; board b was started again in the second one."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    for number, loss in enumerate(losses):
        score = {"loss": loss, "targets": 7, "accuracy": 0.5}
        run.append("metrics.jsonl", {"round": number, "eval": score, "samples": 16 * (number > 0)})
        link = {"bytes_up": 0, "bytes_down": 0, "num_connections": 2}
        link |= {"up_s": 1.0 + 5.0 * number, "down_s": 2.0 * number}
        mark = {"round": number, "time": 100.0 + 10 * number, "cpu_s": 3.0 + 7.0 * number}
        mark["energy_j"] = {"b": (30.0, 55.0, 20.0)[number]}  # its meter began anew
        run.append("marks.jsonl", mark | {"links": {"a": link}})
    for number in (0, 1):
        devices = {}
        for name in drawn[number]:
            compute_s, sent = DEVICES[name]
            total = sent if name == "b" else sent * (number + 1)  # b's counter began anew
            devices[name] = {
                "tokens": 100,
                "compute_s": compute_s,
                "bytes_up": total,
                "bytes_down": 10 * total,
                "peak_bytes": 2**20 * (number + 5),
            }
        run.append("telemetry.jsonl", {"round": number, "seconds": 10.0, "devices": devices})
    facts = {"starts": 1, "peak_group_bytes": 2**22, "killed_for_memory": 0}
    boards = {"a": facts, "b": facts | {"starts": 2}}
    run.write_text("boards.json", json.dumps({"outcome": "completed", "boards": boards}))


def test_costs_and_shares(tmp_path: Path) -> None:
    """Sums over rounds and starts, shares of the real clock, energy measured or estimated."""
    write_run(tmp_path / "run")

    found = read_run(tmp_path / "run", config(), "ours")
    a, b = found.boards

    assert (found.seconds, found.coordinator_s) == (20.0, 14.0)
    assert (a.compute_s, a.bytes_up, a.bytes_down, a.link_s) == (8.0, 2000, 20000, 10.0)
    assert (b.compute_s, b.bytes_up, b.bytes_down, b.link_s) == (2.0, 600, 6000, None)
    assert a.peak_bytes == 6 * 2**20
    assert a.energy_j == pytest.approx(catalogue().boards["orin-nano-8gb"].watts * 8.0)
    assert (a.energy_is_estimated, b.energy_is_estimated) == (True, False)
    assert b.energy_j == 25.0 + 20.0
    assert found.shares() == {
        "a computes": 0.4,
        "b computes": 0.1,
        "link of a": 0.5,
        "coordinator": 0.7,
    }
    assert found.slowest() == ("coordinator", 0.7)


def test_a_round_for_which_a_board_is_not_drawn_is_not_held_against_it(tmp_path: Path) -> None:
    """Shares are of the whole run; tokens a second and joules a token of the rounds it was in."""
    write_run(tmp_path / "run", drawn=("b", "a"))

    found = read_run(tmp_path / "run", config(devices_per_round=1), "ours")
    a, b = found.boards

    assert found.shares() == {
        "a computes": 0.2,
        "b computes": 0.05,
        "link of a": 0.5,
        "coordinator": 0.7,
    }
    assert [(x.rounds, x.tokens, x.trained_s) for x in (a, b)] == [(1, 100, 10.0), (1, 100, 10.0)]
    assert (b.energy_j, b.trained_j) == (45.0, 25.0)  # its meter goes on while it waits
    assert a.energy_j == a.trained_j == catalogue().boards["orin-nano-8gb"].watts * 4.0
    powers = {power.board: power for power in board_powers([found])}
    assert (powers["b"].seconds, powers["b"].joules_per_token) == (10.0, 0.25)
    table = run_table([found], None, is_classifier=False)
    assert [row[table.titles.index("rounds")] for row in table.texts] == ["2", "1", "1"]


def test_a_board_that_is_never_drawn_has_done_nothing(tmp_path: Path) -> None:
    """It held no block and used no memory that anybody measured; it is not called slow or lost."""
    write_run(tmp_path / "run", drawn=("b", "b"))

    found = read_run(tmp_path / "run", config(devices_per_round=1), "ours")

    a, _ = found.boards
    assert (a.rounds, a.tokens, a.compute_s, a.energy_j, a.trained_j) == (0, 0, 0.0, 0.0, 0.0)
    (power,) = (power for power in board_powers([found]) if power.board == "a")
    assert power.joules_per_token is None
    table = run_table([found], None, is_classifier=False)
    row = dict(zip(table.titles, table.texts[1], strict=True))
    assert (row["rounds"], row["blocks"], row["peak memory (MiB)"]) == ("0", "\u2013", "\u2013")
    assert happening_table([found]) is None


def test_the_clock_of_a_cell_is_real(tmp_path: Path) -> None:
    """Times are between evaluations, and a target is reached on the straight line."""
    write_run(tmp_path / "run")

    cell = read_run(tmp_path / "run", config(), "ours").cell

    assert cell is not None
    assert [(p.samples, p.real_s, p.bytes_up, p.loss) for p in cell.points] == [
        (0, 0.0, 0, 4.0),
        (16, 10.0, 1600, 3.0),
        (32, 20.0, 2600, 2.0),
    ]
    reached = cell.reached(2.5)
    assert reached is not None
    assert reached.real_s == 15.0
    assert (cell.device_set, cell.method) == ("real and emulated", "ours")


def test_the_report_holds_every_run(tmp_path: Path) -> None:
    """Both methods against the loss that both reached; what is estimated is called so."""
    write_run(tmp_path / "fast")
    write_run(tmp_path / "slow", losses=(4.0, 3.5, 3.0))
    methods = {"fast": config(), "slow": config()}

    table, *_ = write_report(config(), methods, tmp_path, dict.fromkeys(methods, "completed"))

    assert table.titles[5:7] == ["clock to loss 3 (s)", "energy to loss 3 (J)"]
    whole = {line[0]: line for line in table.texts if line[1] == "all"}
    assert (whole["fast"][5], whole["slow"][5]) == ("10.0", "20.0")
    watts = catalogue().boards["orin-nano-8gb"].watts
    assert whole["fast"][6] == f"{watts * 4.0 + 25.0:,.0f} (estimated)"
    assert whole["fast"][8] == f"{watts * 8.0 + 45.0:,.0f} (estimated)"
    assert [line[1] for line in table.texts[:3]] == ["all", "a", "b"]
    names = {"table", "power"}
    assert {path.stem for path in tmp_path.glob("*.csv")} == names
    assert {path.stem for path in tmp_path.glob("*.tex")} == names
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Loss against time" in html
    assert "coordinator, 70.0 % of the time" in html
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["label"] for result in results] == ["fast", "slow"]


def test_a_round_that_was_not_evaluated_costs_nothing(tmp_path: Path) -> None:
    """Clock, energy and computing are all of the time between the evaluations."""
    write_run(tmp_path / "run", losses=(4.0, 3.0))

    a, b = read_run(tmp_path / "run", config(), "ours").boards

    assert (a.compute_s, b.energy_j) == (4.0, 25.0)
    assert a.energy_j == pytest.approx(catalogue().boards["orin-nano-8gb"].watts * 4.0)


def test_plans_and_importance_are_drawn(tmp_path: Path) -> None:
    """Where a method planned, the report has who held what, and which weights matter."""
    write_run(tmp_path / "run")
    weights = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    for round_, importance in ((0, {}), (1, dict(zip(weights, (1.0, 3.0), strict=True)))):
        plan = {"split": 1 + round_, "ranks": dict.fromkeys(weights, 4)}
        row = {"round": round_, "plans": {"a": plan, "b": plan}, "importance": importance}
        RunFolder(tmp_path / "run").append("plans.jsonl", row)

    write_report(config(), {"run": config()}, tmp_path, {"run": "completed"})

    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Split points and ranks over the rounds" in html
    assert "Importance of weights, run" in html
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"splits-ranks", "importance"}


def test_a_run_of_another_call_is_not_reported(tmp_path: Path) -> None:
    """What was stopped before its turn has no row, whatever its folder holds."""
    write_run(tmp_path / "run")

    assert write_report(config(), {"run": config()}, tmp_path, {"run": "not run"}) == []


def test_a_run_that_never_began_is_no_report(tmp_path: Path) -> None:
    """Nothing to write about."""
    assert write_report(config(), {"run": config()}, tmp_path, {"run": "failed"}) == []
