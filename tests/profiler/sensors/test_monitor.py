"""The monitor, a sample at a time, on boards whose files change."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from profiler.sensors.monitor import BoardEvent, Monitor, Range
from tests.boards import Standing, build
from tests.boards.tree import Files

KIB = 1024


class Watched:
    """A monitored board and a clock that is moved by hand."""

    def __init__(self, name: str, root: Path) -> None:
        self.standing: Standing = build(name, root)
        self.now_s = 0.0
        self.heard: list[BoardEvent] = []
        self.monitor = Monitor(
            self.standing.sources, clock=lambda: self.now_s, on_event=self.heard.append
        )
        self.monitor.sample()

    def after(self, seconds: float, files: Files | None = None) -> list[tuple[float, str, str]]:
        """Change some files, let time pass, sample; returns the events."""
        self.standing.write(files or {})
        self.now_s += seconds
        self.monitor.sample()
        return [(event.at_s, event.kind, event.text) for event in self.monitor.take_events()]


@pytest.fixture
def orin(tmp_path: Path) -> Watched:
    """An Orin Nano with JetPack 6."""
    return Watched("orin_nano_jp6", tmp_path)


def meminfo(available_kib: int) -> Files:
    """How much is available of the Orin Nano's memory."""
    return {"proc/meminfo": f"MemTotal: 7802948 kB\nMemAvailable: {available_kib} kB\n"}


def alert(state: int) -> Files:
    """What the GPU's throttling says."""
    return {"sys/class/thermal/cooling_device2/cur_state": f"{state}\n"}


def counter(number: int, count: int) -> Files:
    """Where an over-current counter stands."""
    return {f"sys/class/hwmon/hwmon0/oc{number}_event_cnt": f"{count}\n"}


def test_nothing_happens_on_an_idle_board(orin: Watched) -> None:
    """Old counts are no events, and neither is the same mode again."""
    assert orin.after(1.0) == []
    assert orin.heard == []


def test_throttling_begins_once_and_ends_after_calm(orin: Watched) -> None:
    """Ten seconds without a sign end it; a pause in between does not."""
    began = orin.after(1.0, alert(1))
    paused = [orin.after(5.0, alert(0)), orin.after(4.0, alert(1)), orin.after(5.0, alert(0))]
    slow = orin.monitor.telemetry()["throttled"]
    ended = orin.after(5.0)

    assert began == [(1.0, "throttling_began", "gpu-throttle-alert")]
    assert paused == [[], [], []]
    assert slow == 1.0
    assert ended == [(20.0, "throttling_ended", "none for 10 s")]
    assert orin.monitor.telemetry()["throttled"] == 0.0
    assert [event.kind for event in orin.heard] == ["throttling_began", "throttling_ended"]


def test_a_counter_that_goes_up_is_throttling(orin: Watched) -> None:
    """Between two samples it may have come and gone; its count stays."""
    events = orin.after(1.0, {**counter(1, 1), **counter(2, 5)})

    assert events == [(1.0, "throttling_began", "under voltage, over current")]


def test_current_peaks_mean_nothing(orin: Watched) -> None:
    """The third counter goes up by tens of thousands at full power."""
    assert orin.after(1.0, counter(3, 99_999)) == []


def test_a_changed_power_mode_is_an_event(orin: Watched) -> None:
    """It tells both names, once."""
    events = orin.after(1.0, {"var/lib/nvpmodel/status": "pmode:0003 fmode:quiet\n"})

    assert events == [(1.0, "power_mode_changed", "power mode is 7W, was 25W")]
    assert orin.after(1.0) == []


def test_low_memory_comes_and_goes_with_a_gap(orin: Watched) -> None:
    """The reserve is 381 MiB: low below half of it, back above the whole, nothing in between."""
    steps = [
        orin.after(1.0, meminfo(200 * KIB)),
        orin.after(1.0, meminfo(180 * KIB)),
        orin.after(1.0, meminfo(300 * KIB)),
        orin.after(1.0, meminfo(400 * KIB)),
        orin.after(1.0, meminfo(200 * KIB)),
    ]

    low = (2.0, "low_memory", "180 of 7,620 MiB available")
    back = (4.0, "memory_back", "400 of 7,620 MiB available")
    assert steps == [[], [low], [], [back], []]


def test_energy_is_power_over_time(orin: Watched) -> None:
    """Joules since the first sample, from the rail of the module."""
    chip = "sys/class/hwmon/hwmon1"
    orin.after(2.0, {f"{chip}/in1_input": "5000\n", f"{chip}/curr1_input": "4000\n"})
    orin.after(0.5)

    joules = orin.monitor.joules()

    assert joules.value == pytest.approx(2.0 * (11.9232 + 20.0) / 2 + 0.5 * 20.0)
    assert (joules.unit, joules.estimated) == ("J", False)


def test_a_card_counts_its_own_energy(tmp_path: Path) -> None:
    """Its counter is what it is at the start; a machine around it makes that an estimate."""
    laptop = Watched("rtx_laptop", tmp_path)
    laptop.standing.board.nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] += 1500
    try:
        laptop.after(1.0)
    finally:
        laptop.standing.board.nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] -= 1500

    assert laptop.monitor.joules() == (1.5, "NVML", "J", True)


def test_telemetry_has_numbers_and_leaves_out_the_unknown(orin: Watched, tmp_path: Path) -> None:
    """A heartbeat takes floats only; what a board cannot tell is not in it."""
    orin.after(1.0, {"proc/stat": "cpu  1500 0 1000 7500 500 0 500 0 0 0\n"})
    numbers = orin.monitor.telemetry()
    container = Watched("container_v2", tmp_path / "container").monitor.telemetry()

    assert {type(value) for value in numbers.values()} == {float}
    assert numbers["cpu_load"] == 50.0
    assert numbers["gpu_clock"] == 612e6
    assert numbers["temperature"] == 52.937
    assert "power" not in container
    assert "temperature" not in container
    assert Monitor(orin.standing.sources).telemetry() == {}


def test_ranges_are_least_mean_and_most(orin: Watched) -> None:
    """Over all samples since the beginning, the first one included."""
    zone = "sys/class/thermal/thermal_zone4/temp"
    for millidegrees in (60_000, 50_000):
        orin.after(1.0, {zone: f"{millidegrees}\n"})

    found = orin.monitor.ranges()["temperature"]

    mean = pytest.approx((52.937 + 60.0 + 50.0) / 3)
    assert found == Range(50.0, mean, 60.0, "C", 3)
    assert "gpu_power" not in orin.monitor.ranges()


def test_the_thread_samples_and_ends(tmp_path: Path) -> None:
    """In the background, from the first sample on until it is stopped."""
    sources = build("xavier_nx_jp5", tmp_path).sources
    ticks = threading.Semaphore(0)
    seconds = iter(range(1_000_000))

    def clock() -> float:
        ticks.release()
        return float(next(seconds))

    with Monitor(sources, interval_s=0.001, clock=clock) as monitor:
        assert monitor.telemetry()["power"] == 15.12
        for _ in range(8):  # two looks at the clock for each sample
            assert ticks.acquire(timeout=20.0)

    assert not any(thread.name == "edgesplit-monitor" for thread in threading.enumerate())
    assert monitor.ranges()["power"].num_samples >= 3
