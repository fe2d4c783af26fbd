"""The modelled clock against times worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from coordinator.lab.simulation.clock import Clock, Machine, central_step_s

# 10 operations a second; 5 bytes a second up, 20 down; half a second there, half a second back.
DEVICE = Machine(flops_per_s=10, watts=5, up_bytes_per_s=5, down_bytes_per_s=20, round_trip_s=1)
SERVER = Machine(flops_per_s=100, watts=300)


def make_clock(names: str = "a", others: Mapping[str, Machine] | None = None) -> Clock:
    """A clock of equal devices, and others."""
    return Clock({**dict.fromkeys(names, DEVICE), **(others or {})}, SERVER)


def one_wave(clock: Clock, device: str) -> None:
    """Forward 2 s, up 3 s."""
    clock.compute(device, 20)
    clock.upload(device, 15)


def test_a_wave_is_the_sum_of_its_stages() -> None:
    """Forward, upload, latency, coordinator, download, latency, backward, one after the other."""
    clock = make_clock()

    one_wave(clock, "a")  # computes until 2, sends until 5, arrives at 5.5
    clock.serve(["a"], 400)  # until 9.5
    clock.download("a", 40)  # until 11.5, arrives at 12
    clock.compute("a", 30)  # until 15
    clock.upload("a", 5)  # until 16, arrives at 16.5

    assert clock.read().seconds == pytest.approx(16.5)


def test_devices_compute_at_the_same_time_and_the_coordinator_waits_for_the_slowest() -> None:
    """A wave begins when its last input is there; its computing is summed over the devices."""
    slow = Machine(flops_per_s=1, up_bytes_per_s=5, round_trip_s=1)
    clock = make_clock("a", {"b": slow})

    one_wave(clock, "a")  # arrives at 5.5
    one_wave(clock, "b")  # computes until 20, arrives at 23.5
    clock.serve(["a", "b"], 400 + 600)

    assert clock.read().seconds == pytest.approx(33.5)


def test_waves_of_different_devices_queue_for_the_coordinator() -> None:
    """The coordinator is one resource: what arrives while it computes waits."""
    clock = make_clock("ab")

    one_wave(clock, "a")
    one_wave(clock, "b")
    clock.serve(["a"], 400)  # 5.5 .. 9.5
    clock.serve(["b"], 400)  # 9.5 .. 13.5
    clock.download("b", 20)  # until 14.5, arrives at 15
    clock.compute("b", 10)  # until 16
    clock.upload("b", 0)

    assert clock.read().seconds == pytest.approx(16.5)


def test_a_message_that_nobody_waits_for_delays_only_the_next_one() -> None:
    """A report leaves while the device computes on; its link carries one message at a time."""
    clock = make_clock()

    clock.upload("a", 15)  # 0 .. 3
    clock.compute("a", 10)  # 0 .. 1
    clock.upload("a", 5)  # 3 .. 4, arrives at 4.5

    assert clock.read().seconds == pytest.approx(4.5)


def test_a_device_with_all_blocks_needs_no_coordinator() -> None:
    """Its round takes its own computing and its own traffic, whatever the others do."""
    clock = make_clock("ab")

    clock.download("b", 20)  # arrives at 1.5
    for _ in range(3):
        clock.compute("b", 50)  # until 16.5
    clock.upload("b", 10)  # until 18.5, arrives at 19
    one_wave(clock, "a")
    clock.serve(["a"], 100)  # 5.5 .. 6.5: not held up by b
    clock.download("a", 20)  # until 7.5, arrives at 8
    reading = clock.read()

    assert reading.seconds == pytest.approx(19)
    assert reading.coordinator.compute_s == pytest.approx(1)


def test_a_round_begins_where_the_last_one_ended() -> None:
    """What the coordinator sends after a round leaves when everybody's upload is there."""
    clock = make_clock("ab")
    clock.upload("a", 50)  # arrives at 10.5
    first = clock.read()

    clock.download("b", 40)  # 10.5 .. 12.5, arrives at 13
    clock.upload("b", 5)  # until 14, arrives at 14.5
    second = clock.read()

    assert (first.seconds, first.round_s) == (pytest.approx(10.5), pytest.approx(10.5))
    assert (second.seconds, second.round_s) == (pytest.approx(14.5), pytest.approx(4))


def test_usage_is_that_of_the_round() -> None:
    """A reading counts each machine's own work and traffic since the one before."""
    clock = make_clock("ab")
    one_wave(clock, "a")
    clock.serve(["a"], 250)
    clock.download("a", 40)
    usage = clock.read()

    again = clock.read()

    mine = usage.devices["a"]
    assert (mine.compute_s, mine.up_s, mine.down_s) == (2, 3, 2)
    assert (mine.bytes_up, mine.bytes_down) == (15, 40)
    assert usage.coordinator.compute_s == 2.5
    assert usage.devices["b"].bytes_up == again.devices["a"].bytes_up == 0
    assert again.coordinator.compute_s == 0


def test_a_central_step_is_only_computing() -> None:
    """One machine with everything has no link to wait for."""
    assert central_step_s(250, SERVER) == 2.5
