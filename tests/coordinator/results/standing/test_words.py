"""What a person reads of a run fits into a terminal, and hides nothing."""

from __future__ import annotations

import io

from rich.console import Console

from coordinator.results.standing.standing import DeviceStanding, Standing
from coordinator.results.standing.words import device_lines, device_table, head, run_table

DEVICE = DeviceStanding(
    name="kitchen-shelf-left",
    doing="fetching its blocks",
    split=12,
    ranks="4-64",
    step=12_345,
    tokens_per_s=12_345.0,
    bytes_up=123_456_700_000,
    bytes_down=123_456_700_000,
    peak_bytes=61_000_000_000,
    memory_bytes=64_000_000_000,
    temperature=71.0,
    trouble="DataError: raised in edge_sdk.data.rows, line 3",
    trouble_time="2026-01-01T00:00:00+0000",
)
RUN = Standing(
    run="run",
    state="running",
    is_running=True,
    is_complete=False,
    is_orderly=False,
    is_between=False,
    round=2,
    rounds=4,
    step=15,
    total_steps=40,
    loss=1.5,
    age_s=90.0,
    quiet_s=1.0,
    round_left_s=12.0,
    run_left_s=70.0,
    devices=(DEVICE,),
)


def test_the_head_says_state_place_and_end() -> None:
    """In this order, a line each."""
    assert head(RUN) == [
        "run run: running",
        "round 2 of 4, step 15 of 40, loss 1.500",
        "begun 1 min 30 s ago, last change 1 s ago",
        "this round ends in about 12 s, the run in about 1 min 10 s",
    ]


def test_tables_fit_into_80_columns_and_cut_nothing() -> None:
    """Large numbers fold into a second line; a name that is too long stands whole below."""
    file = io.StringIO()
    console = Console(file=file, width=80)
    console.print(device_table([DEVICE]))
    console.print(run_table([RUN]))

    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert device_lines([DEVICE]) == [
        "kitchen-shelf-left: fetching its blocks",
        "kitchen-shelf-left, last trouble (2026-01-01T00:00:00+0000): DataError: raised in "
        "edge_sdk.data.rows, line 3",
    ]
