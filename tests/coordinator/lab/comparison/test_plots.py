"""Pictures: they hold the point before training, and are the same in every format and each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.lab.comparison.plots import COSTS, Cost, draw_losses
from tests.coordinator.lab.comparison.made_cells import make_cell


@pytest.mark.parametrize("cost", COSTS)
def test_a_picture_is_written_for_screen_and_print(tmp_path: Path, cost: Cost) -> None:
    """PNG, SVG and PDF of one name; drawn again, the vectors have the same bytes."""
    cells = [make_cell([9.0, 3.0, 2.0]), make_cell([9.0, 2.5, 1.5], method="n")]

    first, second = (draw_losses(cells, cost, 2.2) for _ in range(2))
    first.write(tmp_path)

    heads = {path.suffix: path.read_bytes()[:5] for path in tmp_path.iterdir()}
    assert heads == {".png": b"\x89PNG\r", ".svg": b"<?xml", ".pdf": b"%PDF-"}
    assert first.vectors == second.vectors
    assert "Lines begin before training, at 9." in first.caption
    assert "Below: the same" in first.caption


def test_one_panel_is_enough_where_training_moved_little() -> None:
    """No close-up of what is close already; a loss that is no number is no bound."""
    near = draw_losses([make_cell([3.0, 2.9, 2.0])], COSTS[0], 2.2)
    broken = draw_losses([make_cell([3.0, float("nan"), 2.0])], COSTS[0], 2.2)

    assert "Below: the same" not in near.caption
    assert broken.png.startswith(b"\x89PNG")
