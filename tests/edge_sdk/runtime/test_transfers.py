"""What is copied beside the computation is whole when it is used, and nobody waits too early."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.runtime.transfers import StreamTransfers, Transfers, transfers_of
from tests.edge_sdk.runtime.late_streams import GARBAGE, LateStreams

CPU = torch.device("cpu")
SIZE = 6
NUM_BYTES = 4 * SIZE


@pytest.fixture
def streams() -> LateStreams:
    """Streams that copy as late as they may."""
    return LateStreams()


def numbers(first: int = 0) -> np.ndarray:
    """A few float32 numbers."""
    return np.arange(first, first + SIZE, dtype=np.float32)


def test_the_cpu_copies_nothing() -> None:
    """On the CPU a tensor is the array itself, and the array the tensor itself."""
    array = numbers()
    transfers = transfers_of(CPU)

    there = transfers.upload(array).tensor()
    back = transfers.download(there).array()

    assert type(transfers) is Transfers
    assert there.data_ptr() == array.ctypes.data == back.ctypes.data


def test_an_upload_is_there_when_it_is_used_and_not_before(streams: LateStreams) -> None:
    """Whoever begins an upload waits for nothing; work on the tensor waits for the copy."""
    transfers = StreamTransfers(CPU, streams)

    coming = transfers.upload(numbers())

    assert (coming.raw == GARBAGE).all()
    assert coming.tensor().tolist() == numbers().tolist()


def test_an_array_may_change_once_its_upload_has_begun(streams: LateStreams) -> None:
    """What arrives is what the array held, also where page-locked memory has run out."""
    transfers = StreamTransfers(CPU, streams, most_bytes=2 * NUM_BYTES)
    arrays = [numbers(first) for first in range(4)]

    coming = []
    for array in arrays:
        coming.append(transfers.upload(array))
        array[:] = -1

    found = [upload.tensor().tolist() for upload in coming]
    assert found == [numbers(first).tolist() for first in range(4)]


def test_one_upload_does_not_wait_for_the_next(streams: LateStreams) -> None:
    """Work on a device's tensor begins while another device's is still on its way."""
    transfers = StreamTransfers(CPU, streams)
    first, second = transfers.upload(numbers()), transfers.upload(numbers(9))

    used = first.tensor()

    assert used.tolist() == numbers().tolist()
    assert (second.raw == GARBAGE).all()


def test_a_download_is_whole_when_it_is_read(streams: LateStreams) -> None:
    """The copy is made behind what computed the tensor, and waited for by who reads it."""
    transfers = StreamTransfers(CPU, streams)
    tensor = torch.full((SIZE,), 2.0)
    streams.computing.begin(lambda: tensor.mul_(3.0))

    coming = transfers.download(tensor)

    assert tensor.tolist() == [2.0] * SIZE
    assert coming.array().tolist() == [6.0] * SIZE


def test_a_download_is_float32_whatever_was_computed_in(streams: LateStreams) -> None:
    """Arrays that leave the device are float32."""
    transfers = StreamTransfers(CPU, streams)

    array = transfers.download(torch.ones(SIZE, dtype=torch.bfloat16)).array()

    assert array.dtype == np.float32


def test_memory_of_another_stream_is_held_until_a_copy_is_done(streams: LateStreams) -> None:
    """Both the tensor that was copied to and the one that is read are known to both streams."""
    transfers = StreamTransfers(CPU, streams)

    there = transfers.upload(numbers()).tensor()
    transfers.download(there)

    (up, computing), (down, copying) = streams.held
    assert up is there
    assert computing is streams.computing
    assert down.data_ptr() == there.data_ptr()
    assert copying is not streams.computing


def test_page_locked_memory_is_bounded_and_comes_back(streams: LateStreams) -> None:
    """Beyond the bound copies come from ordinary memory; a copy that is done makes room."""
    transfers = StreamTransfers(CPU, streams, most_bytes=2 * NUM_BYTES)
    coming = [transfers.upload(numbers()) for _ in range(3)]
    assert streams.num_pinned == 2

    coming[0].tensor()
    transfers.upload(numbers())

    assert streams.num_pinned == 3


def test_an_array_that_somebody_holds_keeps_its_memory(streams: LateStreams) -> None:
    """Downloads count while the array or a view of it lives, and no longer."""
    transfers = StreamTransfers(CPU, streams, most_bytes=NUM_BYTES)
    held: Any = transfers.download(torch.ones(SIZE)).array()[1:].reshape(1, -1)

    beside = transfers.download(torch.full((SIZE,), 5.0)).array()
    assert streams.num_pinned == 1
    assert beside.tolist() == [5.0] * SIZE
    assert held.tolist() == [[1.0] * (SIZE - 1)]

    del held
    gc.collect()
    transfers.download(torch.ones(SIZE))
    assert streams.num_pinned == 2


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.bool_])
def test_anything_that_a_step_sends_arrives(streams: LateStreams, dtype: Any) -> None:
    """Ids, lengths, labels and states arrive in their own dtype, also of arrays in pieces."""
    array = (np.arange(24).reshape(4, 6) % 3).astype(dtype)[:, ::2]

    there = StreamTransfers(CPU, streams).upload(array).tensor()

    assert np.array_equal(there.numpy(), array)
    assert there.numpy().dtype == dtype
