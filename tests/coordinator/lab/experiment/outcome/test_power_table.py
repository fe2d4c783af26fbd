"""Which power mode a board should train in: the one in which a token takes the least energy."""

from __future__ import annotations

import csv
import io

from coordinator.lab.experiment.outcome.power_table import (
    best_modes,
    board_powers,
    power_table,
    recommendations,
)
from tests.coordinator.lab.experiment.outcome.made_runs import made_board, made_run


def test_the_mode_with_the_least_energy_for_a_token_is_recommended() -> None:
    """Sums over runs of one mode; not the fastest, and only where there are several to choose."""
    runs = [
        made_run(made_board(power_mode="15W"), made_board(name="b", power_mode="15W")),
        made_run(made_board(power_mode="15W", energy_j=70.0, trained_s=10.0)),
        made_run(made_board(power_mode="MAXN", tokens=2000, energy_j=160.0, trained_s=10.0)),
    ]

    powers = board_powers(runs)

    found = [(p.board, p.mode, p.tokens, p.energy_j, p.joules_per_token) for p in powers]
    assert found == [
        ("a", "15W", 2000, 120.0, 0.06),
        ("a", "MAXN", 2000, 160.0, 0.08),
        ("b", "15W", 1000, 50.0, 0.05),
    ]
    assert {board: best.mode for board, best in best_modes(powers).items()} == {"a": "15W"}
    assert recommendations(powers) == [
        "Train a in power mode 15W: a token takes 0.06 J (measured), less than in the others "
        "(MAXN 0.08)."
    ]
    rows = list(csv.DictReader(io.StringIO(power_table(powers).csv())))
    assert [row["recommended"] for row in rows] == ["yes", "", ""]
    assert float(rows[1]["tokens_per_s"]) == 200.0


def test_what_is_modelled_is_called_so() -> None:
    """An emulated board's power is never shown as a reading; one without a meter has none."""
    half, full = (
        made_run(made_board(power_mode=mode, energy_j=joules, energy_is_estimated=True))
        for mode, joules in (("half", 30.0), ("full", 60.0))
    )
    blind = made_run(made_board(name="blind", energy_j=None))

    powers = board_powers([half, full, blind])

    assert [row[6] for row in power_table(powers).texts] == ["modelled", "modelled", "\u2013"]
    (sentence,) = recommendations(powers)
    assert "power mode half: a token takes 0.03 J (modelled)" in sentence
    assert [power.mode for power in powers] == ["half", "full", "as it is"]
