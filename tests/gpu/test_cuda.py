"""On CUDA: copies beside the computation, and both sides of the cut against the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from edge_sdk.errors import is_out_of_memory
from edge_sdk.runtime.training import seed_step
from edge_sdk.runtime.transfers import CudaStreams, StreamTransfers, transfers_of
from profiler.sensors.power import gpu_power
from profiler.sensors.sources import HERE
from tests.conftest import TESTS
from tests.far_steps import CASES, difference

pytestmark = pytest.mark.gpu
# Other kernels than the CPU's, behind AdamW, which divides by small numbers.
BOUND = 2e-2
# Cycles of a kernel that does nothing: about half a second.
LONG = 1_000_000_000


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The first CUDA device, idle before and after."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.synchronize()
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()


def numbers(seed: int, size: int = 1 << 20) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def test_a_copy_does_not_wait_for_the_computation_before_it(cuda: torch.device) -> None:
    """An upload is begun and arrives while the device still computes what was begun before."""
    transfers = transfers_of(cuda)
    transfers.upload(numbers(0)).tensor()  # page-locked memory is taken once
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    computed = torch.cuda.current_stream().record_event()

    coming = transfers.upload(numbers(1))
    transfers._up.synchronize()  # type: ignore[attr-defined]

    assert not computed.query()
    assert np.array_equal(coming.tensor().cpu().numpy(), numbers(1))


def test_what_is_read_is_what_was_computed(cuda: torch.device) -> None:
    """A download waits for the kernels that were begun before it, and no array is another's."""
    transfers = transfers_of(cuda)
    found = []
    for seed in range(20):
        there = transfers.upload(numbers(seed)).tensor()
        torch.cuda._sleep(LONG // 100)
        found.append(transfers.download(there * 2))

    for seed, coming in enumerate(found):
        assert np.array_equal(coming.array(), 2 * numbers(seed))


def test_arrays_arrive_also_without_page_locked_memory(cuda: torch.device) -> None:
    """Beyond the bound copies come from ordinary memory."""
    transfers = StreamTransfers(cuda, CudaStreams(cuda), most_bytes=3 << 20)

    arrived = [transfers.upload(numbers(seed)).tensor() for seed in range(8)]
    back = [transfers.download(tensor) for tensor in arrived]

    for seed, coming in enumerate(back):
        assert np.array_equal(coming.array(), numbers(seed))


@pytest.mark.parametrize("case", [case for case in CASES if case != "absent parts"])
def test_a_step_is_the_cpus(cuda: torch.device, case: str) -> None:
    """Steps, evaluation, a round's change and a restart compute what the CPU computes."""
    found, expected = CASES[case](str(cuda)), CASES[case](None)

    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) < BOUND


def test_dropout_is_drawn_from_the_step(cuda: torch.device) -> None:
    """The generator of the device that computes is seeded, whichever is the current one."""
    draws = []
    for _ in range(2):
        seed_step(0, cuda, "device", 3, 0)
        draws.append(torch.rand(8, device=cuda).tolist())

    assert draws[0] == draws[1]


def test_exhausted_memory_is_known(cuda: torch.device) -> None:
    """What torch raises when the GPU is full is how we know that memory is exhausted."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50, dtype=torch.uint8, device=cuda)

    assert is_out_of_memory(found.value)


def test_the_board_says_what_it_draws(cuda: torch.device) -> None:
    """NVML answers, where its Python package is installed."""
    pytest.importorskip("pynvml", reason="no CUDA device's NVML: nvidia-ml-py is not installed")

    assert (gpu_power(HERE).value or 0) > 0


def test_streams_are_in_order_by_torchs_sanitizer(cuda: torch.device) -> None:
    """The detector of races that torch has finds none in steps of both sides."""
    code = (
        "from tests.far_steps import CASES\n"
        f"for case in ('device llama', 'engine llama'): CASES[case]({str(cuda)!r})"
    )
    env = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
