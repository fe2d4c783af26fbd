"""Tables on a screen: columns under each other, and no line that is wider than the screen."""

from __future__ import annotations

from coordinator.commands.aligned import aligned

TITLES = ["method", "devices", "loss before training", "loss", "traffic (MB)"]
ROWS = [
    ["hsplitlora", "few", "4.1234", "3.1", "12,345.6"],
    ["ft", "few", "4.1234", "2.95", "1.0"],
]


def test_columns_stand_under_each_other() -> None:
    """Names to the left, numbers to the right, long titles on several lines."""
    assert aligned(TITLES, ROWS, 80).splitlines() == [
        "                     loss before",
        "method      devices     training  loss  traffic (MB)",
        "----------  -------  -----------  ----  ------------",
        "hsplitlora  few           4.1234   3.1      12,345.6",
        "ft          few           4.1234  2.95           1.0",
    ]


def test_what_has_no_room_goes_on_below() -> None:
    """With the names of the rows again, and every cell once."""
    text = aligned(TITLES, ROWS, 40)

    assert max(map(len, text.splitlines())) <= 40
    assert text.count("hsplitlora") == 2
    assert all(text.count(cell) == 1 for cell in ("3.1", "2.95", "12,345.6"))
    assert text.count("4.1234") == 2


def test_one_column_may_be_wider_than_the_screen() -> None:
    """Nothing is cut."""
    assert "x" * 50 in aligned(["a", "b", "c"], [["r", "s", "x" * 50]], 30)
