"""Measurements: the arithmetic against a fake clock, the rest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from profiler import measure
from profiler.measure import gemm_rates, measure_block, measure_profile, measure_step, seconds_of
from profiler.profile import problems
from profiler.sensors.memory_budget import reserve_bytes
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import stub
from tests.tiny import FAMILIES, OTHERS, make_config

MIB = 2**20


class Work:
    """Something that takes the given seconds, one after the other, on a clock of its own."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds = seconds
        self.now_s = 0.0
        self.num_runs = 0

    def __call__(self) -> None:
        """Work once."""
        self.now_s += next(self._seconds)
        self.num_runs += 1

    def clock(self) -> float:
        """Return the time."""
        return self.now_s


def after_warm_up(*seconds: float) -> Work:
    """Work of which the first run takes ten times as long, as with kernels that are compiled."""
    return Work(iter([10 * seconds[0], *seconds]))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no longer than a test needs."""
    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    monkeypatch.setattr(measure, "GEMM_ENOUGH_S", 0.0)


def test_the_median_without_the_warm_up() -> None:
    """Slow runs count three times, and neither the first nor an outlier counts."""
    work = after_warm_up(2.0, 1.0, 50.0)

    found = seconds_of(work, work.clock)

    assert (found.value, found.unit, work.num_runs) == (2.0, "s", 4)
    assert found.source == "median of 3, spread 2450 %"


def test_short_runs_are_repeated_and_bounded() -> None:
    """A run of a millisecond is repeated an odd number of times, but not for a second."""
    work = Work(iter([0.001] * 100))

    found = seconds_of(work, work.clock)

    assert work.num_runs == 1 + 31
    assert found.value == pytest.approx(0.001)


@pytest.mark.parametrize(("runs", "expected"), [((0.5,) * 9, 3), ((0.25,) * 9, 5)])
def test_an_odd_number_that_lasts_long_enough(runs: tuple[float, ...], expected: int) -> None:
    """Repeated until a second has passed, then to the next odd number."""
    work = after_warm_up(*runs)
    seconds_of(work, work.clock)

    assert work.num_runs - 1 == expected


def test_a_step_has_a_speed() -> None:
    """Operations of one call by its median time."""
    work = after_warm_up(2.0, 2.0, 2.0)

    found = measure_step(work, 6e9, work.clock)

    assert (found.value, found.unit) == (3e9, "FLOP/s")


@pytest.mark.usefixtures("fast")
def test_products_are_measured_in_each_dtype() -> None:
    """Every dtype that this processor multiplies has a positive rate."""
    rates = gemm_rates()

    assert list(rates) == ["float32", "bfloat16", "float16"]
    assert all((rate.value or 0.0) > 0.0 for rate in rates.values())


def test_an_emulated_dtype_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that only emulates bfloat16 there is no rate, and the reason stands there."""
    asked: list[str] = []

    def rate(name: str, _device: str) -> measure.Reading:
        asked.append(name)
        raise RuntimeError('"addmm_impl" not implemented for this dtype')

    monkeypatch.setattr(measure, "_gemm_rate", rate)
    sources = Sources(tmp_path, Nvml(stub("GPU", nvmlDeviceGetCudaComputeCapability=(7, 2))))

    rates = gemm_rates("cuda", sources)

    assert asked == ["float32", "float16"]
    assert rates["bfloat16"][:2] == (None, "only emulated by this GPU")
    assert rates["float32"][:2] == (None, "not supported")


# ---- one block -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the config of a family, and nothing else, to a folder."""

    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_config(family).save_pretrained(folder)
        return folder

    return save


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_block_of_every_family_runs(saved: Callable[[str], Path], family: str) -> None:
    """One block is built from the config alone and has a time, a speed and a size."""
    found = measure_block(saved(family), rows=2, length=8)

    assert found.seconds.value is not None
    assert found.flops_per_s.value == found.flops / found.seconds.value
    assert 0 < found.weight_bytes < 100_000


@pytest.mark.usefixtures("fast")
def test_operations_are_those_of_one_block(saved: Callable[[str], Path]) -> None:
    """Frozen weights cost two products, attention its own and twice that backward: by hand."""
    rows, length, hidden, kv, inner, heads, head_dim = 3, 8, 32, 16, 48, 4, 8
    weights = 2 * hidden * hidden + 2 * kv * hidden + 3 * inner * hidden
    products = 2 * 2 * weights * rows * length
    attention = 3 * 2 * 2 * rows * heads * length * length * head_dim

    found = measure_block(saved("llama"), rows=rows, length=length)

    assert found.flops == products + attention
    norms = 3 * hidden  # two of the block, one at the end of the model
    assert found.weight_bytes == 4 * (weights + norms + 8 * hidden)  # 8 tokens


@pytest.mark.usefixtures("fast")
def test_a_block_in_half_precision(saved: Callable[[str], Path]) -> None:
    """The same work on half the bytes."""
    whole = measure_block(saved("llama"), rows=1, length=8)
    half = measure_block(saved("llama"), rows=1, length=8, dtype="bfloat16")

    assert (half.flops, half.weight_bytes) == (whole.flops, whole.weight_bytes / 2)


def test_what_cannot_be_measured_is_one_clear_line(
    tmp_path: Path, saved: Callable[[str], Path]
) -> None:
    """A folder without config, a config that is none, and a length beyond the positions."""
    with pytest.raises(ValueError, match=r"^model: no config.json in '.*'; name the folder"):
        measure_block(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match=r"^model: config.json in '.*' is of no use: ") as caught:
        measure_block(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^length must be 1\.\.64, .* got 65$"):
        measure_block(saved("llama"), length=65)


def test_the_peak_beyond_the_weights(
    tmp_path: Path, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run holds besides its weights shows up in the peak."""
    if not measure.reset_peak_rss():
        pytest.skip("this kernel does not let a process reset its peak")

    with measure._peak("cpu") as peak:
        block = torch.ones(16 * MIB)
        del block

    assert peak[0].value is not None
    assert 48 * MIB < peak[0].value < 128 * MIB


# ---- a device ------------------------------------------------------------------------------------


def test_a_profile_of_a_board(tmp_path: Path) -> None:
    """Budget, total, overhead, name and mode of a whole board; what was measured is passed on."""
    standing = build("orin_nano_jp6", tmp_path)
    values = standing.board.values

    profile = measure_profile(standing.sources, device="cuda", flops_per_s=2e12)

    assert profile.memory_bytes == values["memory_budget"]
    assert profile.total_memory_bytes == values["memory_total"]
    assert profile.overhead_bytes == 100 * MIB
    assert (profile.board, profile.power_mode) == (values["board"], "25W")
    assert (profile.native_bf16, profile.flops_per_s) == (True, 2e12)
    assert problems(profile) == []


def test_a_profile_of_a_card(tmp_path: Path) -> None:
    """A card's own memory holds no libraries: nothing of it is overhead."""
    standing = build("rtx_laptop", tmp_path)

    profile = measure_profile(standing.sources, device="cuda")

    assert profile.total_memory_bytes == 6144 * MIB
    assert profile.memory_bytes == 5120 * MIB - reserve_bytes(6144 * MIB)
    assert profile.overhead_bytes == 0.0


def test_a_profile_with_settings_by_hand(tmp_path: Path) -> None:
    """What was set or measured elsewhere is taken; a budget beyond the total is refused."""
    sources = build("raspberry_pi_5", tmp_path).sources

    profile = measure_profile(sources, memory_bytes=2.0 * 2**30, overhead_bytes=1.0)

    assert (profile.memory_bytes, profile.overhead_bytes) == (2 * 2**30, 1)
    with pytest.raises(ValueError, match="memory_bytes is"):
        measure_profile(sources, memory_bytes=2.0 * 2**40)


def test_a_profile_of_this_machine() -> None:
    """The real machine has a budget within its memory."""
    profile = measure_profile()

    assert problems(profile) == []
    assert profile.memory_bytes is not None
    assert profile.overhead_bytes is not None
    assert profile.memory_bytes > profile.overhead_bytes > 0
