"""A device gets all, a change or a word to use its own past, and then holds dW in each case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordinator.aggregation.ledger import RoundResult
from coordinator.aggregation.round_start import RoundStartBuilder
from edge_sdk.protocol.messages import Stamp
from edge_sdk.protocol.plan import Plan
from tests.coordinator.aggregation.test_ledger import RANKS, SAMPLES, SPLITS, Simulation

HEAD = {"score.weight": np.ones(3, np.float32)}


def make_plan(simulation: Simulation, name: str, *, tail: bool = False) -> Plan:
    """The plan of one of the simulated devices."""
    return Plan(
        split=SPLITS[name],
        ranks=simulation.wanted(name),
        alphas={},
        batch_size=SAMPLES[name],
        micro_batch=1,
        tail=tail,
    )


def after_a_round(rule: str = "exact") -> tuple[Simulation, RoundStartBuilder, RoundResult]:
    """Round 0 with two of three devices is over."""
    simulation = Simulation(rule, dict.fromkeys(RANKS, 3))
    result = simulation.round({"one", "four"}, {"one": HEAD})
    round_start = RoundStartBuilder(simulation.ledger, simulation.facts)
    round_start.round_ended(result, {"one", "four"})
    return simulation, round_start, result


STAMP = Stamp(device="one", round=1, step=20)


def test_a_member_gets_what_has_changed() -> None:
    """Who was in the last round needs only the changes of its own blocks."""
    simulation, round_start, result = after_a_round()

    start, tensors = round_start.message(
        STAMP, 40, make_plan(simulation, "one"), (20,), evaluate=True
    )

    assert (start.is_full, start.restore_step, start.evaluate) == (False, -1, True)
    weights = simulation.weights("one")
    assert tensors.keys() == {f"{n}.{letter}" for n in weights for letter in "UV"}
    for name in weights:
        assert tensors[f"{name}.U"] == (result.changes[name].b_OR, "float32")
        assert tensors[f"{name}.V"][0] is result.changes[name].a_RI


@pytest.mark.parametrize("rule", ["exact", "fedex", "stack", "svd"])
def test_members_of_equal_parts_are_sent_the_same(rule: str) -> None:
    """Its tensors are put together once; what is added for one of them reaches no other."""
    simulation, round_start, result = after_a_round(rule)
    result.replaced["four"] = result.replaced.get("one", {})  # as if it had the same plan
    plan = make_plan(simulation, "one")
    stamps = STAMP, replace(STAMP, device="four")

    with_tail, other = (
        round_start.message(stamp, 40, replace(plan, tail=tail), (), evaluate=False)[1]
        for stamp, tail in zip(stamps, (True, False), strict=True)
    )
    round_start.round_ended(replace(result, changes={}), {"one", "four"})
    _, later = round_start.message(STAMP, 40, plan, (), evaluate=False)

    assert with_tail.keys() == other.keys() | HEAD.keys()
    assert all(with_tail[name][0] is tensor for name, (tensor, _) in other.items())
    assert other
    assert not [name for name in later if name.endswith(".V")]


def test_a_newcomer_gets_everything() -> None:
    """Own factors and residual together are dW."""
    simulation, round_start, _ = after_a_round()
    stamp = Stamp(device="two", round=1, step=20)

    start, tensors = round_start.message(
        stamp, 40, make_plan(simulation, "two"), (), evaluate=False
    )

    assert (start.is_full, start.restore_step) == (True, -1)
    arrays = {name: array.astype(np.float64) for name, (array, _) in tensors.items()}
    for name in simulation.weights("two"):
        own = 2.0 * arrays[f"{name}.B"] @ arrays[f"{name}.A"]  # alpha / rank = 8 / 4
        found = own + arrays[f"{name}.U"] @ arrays[f"{name}.V"]
        expected = simulation.expected[name]
        assert np.linalg.norm(found - expected) <= 3e-6 * np.linalg.norm(expected)


def test_who_kept_its_state_is_told_to_use_it() -> None:
    """After a restart of the coordinator a device with a checkpoint of this step restores it."""
    simulation, round_start, _ = after_a_round()
    round_start.forget()

    start, tensors = round_start.message(
        STAMP, 40, make_plan(simulation, "one"), (0, 20), evaluate=False
    )

    assert (start.is_full, start.restore_step, tensors) == (False, 20, {})


def test_who_left_gets_everything_again() -> None:
    """A device that was lost is told everything, the others only what has changed."""
    simulation, round_start, _ = after_a_round()

    round_start.forget("one")

    start, _ = round_start.message(STAMP, 40, make_plan(simulation, "one"), (), evaluate=False)
    other, _ = round_start.message(
        Stamp(device="four"), 40, make_plan(simulation, "four"), (), evaluate=False
    )
    assert (start.is_full, other.is_full) == (True, False)


@pytest.mark.parametrize("is_current", [True, False])
def test_the_head_goes_to_who_has_the_tail(is_current: bool) -> None:
    """A trained head travels with either kind of start, to devices with the tail only."""
    simulation, round_start, result = after_a_round()
    if not is_current:
        round_start.forget()

    with_tail, without = (
        round_start.message(STAMP, 40, make_plan(simulation, "one", tail=tail), (), evaluate=False)[
            1
        ]
        for tail in (True, False)
    )

    assert with_tail.keys() - without.keys() == HEAD.keys()
    assert np.array_equal(with_tail["score.weight"][0], result.head["score.weight"])
