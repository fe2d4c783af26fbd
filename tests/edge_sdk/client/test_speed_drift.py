"""A device notices that it computes or hears otherwise than when its plan was made."""

from __future__ import annotations

import pytest

from edge_sdk.client.profile import changed_profile
from edge_sdk.client.speed_drift import SpeedDrift
from profiler.profile import DeviceProfile


def told(drift: SpeedDrift, compute_s: float, wait_s: float) -> tuple[float | None, bool]:
    """A round of four steps of 100 tokens."""
    for extra in (0.0, 0.0, 0.01, 9.0):  # one step was slow for reasons of its own
        drift.step(100, compute_s + extra, wait_s)
    return drift.end_round()


def test_a_first_round_and_noise_change_nothing() -> None:
    """Rates within a fifth of the first round's are not reported."""
    drift = SpeedDrift()

    assert told(drift, 1.0, 0.5) == (None, False)
    assert told(drift, 1.1, 0.6) == (None, False)
    assert SpeedDrift().end_round() == (None, False)


@pytest.mark.parametrize(("compute_s", "factor"), [(2.0, 0.5), (0.5, 2.0)])
def test_another_speed_is_reported_once(compute_s: float, factor: float) -> None:
    """The factor is that of the median step, against what was last reported."""
    drift = SpeedDrift()
    told(drift, 1.0, 0.5)

    found, is_link_due = told(drift, compute_s, 0.5)

    assert found == pytest.approx(factor, rel=0.02)
    assert not is_link_due
    assert told(drift, compute_s, 0.5) == (None, False)


def test_longer_waits_ask_for_the_link_to_be_measured() -> None:
    """Waiting half as long again may be the link or the coordinator: measuring tells."""
    drift = SpeedDrift()
    told(drift, 1.0, 0.5)

    assert told(drift, 1.0, 0.8) == (None, True)


def test_a_board_that_has_changed_is_measured_anew_and_told_however_little_that_is() -> None:
    """Steps from before the change do not count, and the change is told once."""
    drift = SpeedDrift()
    told(drift, 1.0, 0.5)
    for _ in range(10):
        drift.step(100, 1.0, 0.5)

    drift.begin_anew()
    factor, _ = told(drift, 1.1, 0.5)

    assert factor == pytest.approx(1 / 1.1, rel=0.02)
    assert told(drift, 1.15, 0.5) == (None, False)


def test_a_change_in_the_last_step_of_a_round_is_told_after_the_next() -> None:
    """A round without a step to judge by tells nothing and forgets nothing."""
    drift = SpeedDrift()
    told(drift, 1.0, 0.5)
    drift.begin_anew()
    assert drift.end_round() == (None, False)

    factor, _ = told(drift, 1.1, 0.5)

    assert factor == pytest.approx(1 / 1.1, rel=0.02)


def test_a_change_in_the_first_round_is_judged_by_the_steps_before_it() -> None:
    """The plan was made for the speed that these had."""
    drift = SpeedDrift()
    for _ in range(4):
        drift.step(100, 1.0, 0.5)

    drift.begin_anew()
    factor, _ = told(drift, 2.0, 0.5)

    assert factor == pytest.approx(0.5, rel=0.02)


def test_a_change_before_anything_was_compared_is_no_change_when_it_is_over() -> None:
    """The speed that the coordinator knows is that of the board without it."""
    drift = SpeedDrift()
    drift.begin_anew()  # throttled from the first step on
    assert told(drift, 2.0, 0.5) == (None, False)

    drift.begin_anew()  # no longer
    assert told(drift, 1.0, 0.5) == (None, False)
    assert told(drift, 1.0, 0.5) == (None, False)

    factor, _ = told(drift, 2.0, 0.5)
    assert factor == pytest.approx(0.5, rel=0.02)


def test_a_change_that_was_not_told_yet_outlives_the_plan() -> None:
    """The new plan's first round is that of a changed board, and compared with nothing later."""
    drift = SpeedDrift()
    told(drift, 1.0, 0.5)
    drift.begin_anew()  # in the last step
    assert drift.end_round() == (None, False)

    drift = drift.of_new_plan()
    assert told(drift, 2.0, 0.5) == (None, False)
    drift.begin_anew()

    assert told(drift, 1.0, 0.5) == (None, False)


def test_what_was_set_by_hand_stays() -> None:
    """A budget that a person has written is never changed by a measurement."""
    by_hand = DeviceProfile(flops_per_s=5.0, up_bytes_per_s=7.0)
    old = DeviceProfile(flops_per_s=5.0, up_bytes_per_s=7.0, down_bytes_per_s=8.0)

    found = changed_profile(old, by_hand, 0.5, is_link_due=True)

    assert found == by_hand
    free = changed_profile(DeviceProfile(flops_per_s=5.0), DeviceProfile(), 0.5, is_link_due=False)
    assert free.flops_per_s == 2.5
