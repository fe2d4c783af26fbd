"""Energy of dW by rank: a table of what was recorded, and a picture of every round of it."""

from __future__ import annotations

import csv
import io

from coordinator.lab.comparison.rank_energy import draw_energy, energy_table
from tests.coordinator.lab.comparison.made_cells import make_cell

DEEP = tuple((round_, (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)) for round_ in (1, 2))
CELLS = [
    make_cell([3.0, 2.0], rank_energy=((1, (0.5, 0.9, 1.0)), (2, (0.75, 1.0)))),
    make_cell([3.0, 2.0], seed=1, rank_energy=((1, (0.1, 1.0)),)),
    make_cell([3.0, 2.0], method="deep", rank_energy=DEEP),
    make_cell([3.0, 2.0], method="without"),
]


def test_the_table_has_the_shares_after_the_last_round() -> None:
    """Of the first seed; what has no further singular values has nothing there."""
    table = energy_table(CELLS)

    assert table is not None
    first, deep = csv.DictReader(io.StringIO(table.csv()))
    assert (first["round"], first["within_1"], first["within_2"], first["within_4"]) == (
        "2",
        "0.75",
        "1.0",
        "",
    )
    assert (deep["method"], deep["within_64"], deep["within_128"]) == ("deep", "0.99", "1.0")
    assert table.texts[0][3:6] == ["75.00", "100.00", "\u2013"]


def test_every_method_has_a_panel() -> None:
    """Also where one has more singular values than another; none where nothing was recorded."""
    picture = draw_energy(CELLS)

    assert picture is not None
    svg = dict(picture.vectors)["svg"].decode()
    assert picture.png.startswith(b"\x89PNG")
    assert "<!-- deep -->" in svg
    assert "<!-- 17 and further -->" in svg
    assert "<!-- without -->" not in svg
    assert draw_energy(CELLS[3:]) is None
    assert energy_table(CELLS[3:]) is None
