"""Split points: the shortest wave of all, or one line that says why there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.splits import (
    Option,
    Server,
    Splits,
    choose_splits,
    deepest_splits,
    fitting,
    server_bytes,
)
from edge_sdk.errors import ConfigError

Tables = dict[str, list[Option]]
NUMBERS = st.integers(0, 9)


def falling(draw: st.DrawFn, length: int) -> list[int]:
    """Numbers that never grow."""
    return sorted(draw(st.lists(NUMBERS, min_size=length, max_size=length)), reverse=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tables, dict[str, float], Server]:
    """Up to three devices of any speed and memory, at a model of up to four blocks."""
    num_blocks = draw(st.integers(1, 4))
    tables, budgets = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        held, shares = falling(draw, num_blocks), falling(draw, num_blocks)
        speed_known = draw(st.booleans())
        tables[name] = [
            Option(
                k + 1,
                draw(NUMBERS),
                draw(NUMBERS) / 2 if speed_known else None,
                held[k],
                # thirds: sums of these depend on their order unless they are summed exactly
                shares[k] / 3,
            )
            for k in range(num_blocks)
        ]
        budgets[name] = draw(st.sampled_from([2.0, 5.0, 9.0, math.inf]))
    server = Server(draw(st.sampled_from([6.0, 15.0, math.inf])), falling(draw, num_blocks + 1))
    return tables, budgets, server


def all_choices(tables: Tables, budgets: Mapping[str, float], server: Server) -> list[list[Option]]:
    """Every combination that fits everybody's memory."""
    fits = [[o for o in own if o.device_bytes <= budgets[name]] for name, own in tables.items()]
    combinations = [list(choice) for choice in itertools.product(*fits)]
    return [
        choice
        for choice in combinations
        if server_bytes(server, dict(zip(tables, choice, strict=True))) <= server.budget_bytes
    ]


def wave_s(choice: Sequence[Option]) -> float:
    """The slower side's time."""
    return max([math.fsum(o.server_s for o in choice), *(o.device_s or 0.0 for o in choice)])


def outcome(
    tables: Tables, budgets: dict[str, float], server: Server, pins: dict[str, int] | None = None
) -> Splits | None:
    """The planner's choice, None where it refuses."""
    try:
        return choose_splits(tables, budgets, server, pins)
    except ConfigError:
        return None


@given(cases())
def test_no_other_choice_has_a_shorter_wave(
    case: tuple[Tables, dict[str, float], Server],
) -> None:
    """Against every combination of splits; what fits nowhere is refused, and nothing else is."""
    tables, budgets, server = case
    best = min(map(wave_s, all_choices(tables, budgets, server)), default=None)

    found = outcome(tables, budgets, server)

    assert (found is None) == (best is None)
    if found is not None:
        chosen = [found.chosen[name] for name in tables]
        assert chosen in all_choices(tables, budgets, server)
        assert found.wave_s == wave_s(chosen) == best


@given(cases())
def test_each_device_goes_as_deep_as_the_wave_allows(
    case: tuple[Tables, dict[str, float], Server],
) -> None:
    """Among the choices of the shortest wave, the one that relieves the coordinator most."""
    tables, budgets, server = case
    found = outcome(tables, budgets, server)

    for name, option in found.chosen.items() if found else []:
        able = fitting(name, tables[name], budgets[name])
        assert option == [o for o in able if (o.device_s or 0.0) <= found.wave_s][-1]


@given(cases())
def test_the_memory_rule_takes_the_deepest_that_fits(
    case: tuple[Tables, dict[str, float], Server],
) -> None:
    """It is the choice of a coordinator that no wave can be too long for."""
    tables, budgets, server = case
    try:
        found = deepest_splits(tables, budgets, server)
    except ConfigError:
        assert not all_choices(tables, budgets, server)
        return
    deepest = {name: fitting(name, tables[name], budgets[name])[-1] for name in tables}
    assert found.chosen == deepest


@given(cases(), st.data())
def test_a_pin_is_one_choice_less(
    case: tuple[Tables, dict[str, float], Server], data: st.DataObject
) -> None:
    """A pinned device is planned as if its table had one row."""
    tables, budgets, server = case
    pin = data.draw(st.sampled_from(tables["a"]))

    found = outcome(tables, budgets, server, {"a": pin.split})

    alone = outcome({**tables, "a": [pin]}, budgets, server)
    assert (found and found.chosen, found and found.wave_s) == (
        alone and alone.chosen,
        alone and alone.wave_s,
    )
    assert found is None or found.binding["a"] == "fixed"


def blocks(
    num_blocks: int, block_s: float, *, block_bytes: float = 100.0, server_s: float = 1.0
) -> list[Option]:
    """A device on which every block costs the same."""
    return [
        Option(k, k * block_bytes, k * block_s, 10.0, (num_blocks - k) * server_s)
        for k in range(1, num_blocks + 1)
    ]


ROOMY = Server(math.inf, [800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0, 0.0])


def test_what_keeps_a_device_from_going_deeper() -> None:
    """Memory, the wave's time, the end of the model or the user."""
    tables = {
        "small": blocks(8, 0.1),
        "slow": blocks(8, 4.0),
        "able": blocks(8, 0.1),
        "told": blocks(8, 0.1),
    }
    budgets = {"small": 250.0, "slow": math.inf, "able": math.inf, "told": math.inf}

    found = choose_splits(tables, budgets, ROOMY, {"told": 3})

    assert found.binding == {
        "small": "memory",
        "slow": "time",
        "able": "all blocks",
        "told": "fixed",
    }
    # coordinator: 6 + (8 - k) + 0 + 5 for the slow one's k, who needs 4 k: 16 s at k = 3 and at 4
    assert {name: option.split for name, option in found.chosen.items()} == {
        "small": 2,
        "slow": 4,
        "able": 8,
        "told": 3,
    }
    assert (found.wave_s, found.server_s, found.server_bytes) == (16.0, 15.0, 640.0)


def test_a_slower_coordinator_gets_less() -> None:
    """Water flows to where there is room: devices go deeper as the coordinator slows down."""
    depths = []
    for server_s in (0.01, 0.1, 1.0, 10.0):
        tables = {name: blocks(8, 0.5, server_s=server_s) for name in "abc"}
        found = choose_splits(tables, dict.fromkeys("abc", math.inf), ROOMY)
        depths.append(found.chosen["a"].split)

    assert depths == [1, 3, 7, 8]


@pytest.mark.parametrize(
    ("budget", "pin", "words"),
    [
        (60.0 * 2**20, None, ["device 'a': split 1 needs 100.0 MiB", "budget is 60.0 MiB"]),
        (1e9, 9, ["devices.a.split: 9 is outside 1..8"]),
        (250.0 * 2**20, 3, ["devices.a.split: 3 needs 300.0 MiB", "budget is 250.0 MiB"]),
    ],
)
def test_a_device_that_fits_nothing(budget: float, pin: int | None, words: list[str]) -> None:
    """Device, bytes that it takes, bytes that there are, and what helps."""
    table = blocks(8, 0.1, block_bytes=100.0 * 2**20)

    with pytest.raises(ConfigError) as caught:
        choose_splits({"a": table}, {"a": budget}, ROOMY, {} if pin is None else {"a": pin})

    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_coordinator_that_is_too_small() -> None:
    """It is told which blocks it would have to hold, what they take and what it has."""
    server = Server(300.0 * 2**20, [b * 2.0**20 for b in ROOMY.base_bytes])
    for rule in (choose_splits, deepest_splits):
        with pytest.raises(ConfigError, match=r"needs 600.0 MiB for blocks 2..7 .* is 300.0 MiB"):
            rule({"a": blocks(8, 0.1)}, {"a": 250.0}, server)


def test_nobody_is_a_plan_too() -> None:
    """Without devices there is nothing to wait for."""
    assert choose_splits({}, {}, ROOMY) == Splits({}, 0.0, 0.0, 0.0, {})
