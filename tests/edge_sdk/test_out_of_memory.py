"""Lack of memory is recognised however it is said, and nothing else is taken for it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest

from edge_sdk.errors import (
    DataError,
    EdgeError,
    ModelError,
    PeerGone,
    StorageError,
    is_out_of_memory,
)
from edge_sdk.files import storage_errors


class OutOfMemoryError(RuntimeError):
    """As torch calls it; torch itself is not imported for a name."""


class Fail(Exception):  # noqa: N818 - onnxruntime's name
    """onnxruntime's errors derive from Exception alone."""


SAID = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has ..."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 281474976710656 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"
    ),
    RuntimeError(
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at "
        '"/opt/pytorch/c10/cuda/CUDACachingAllocator.cpp":838, please report a bug to PyTorch.'
    ),
    RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12"),
    RuntimeError("NvMapMemHandleAlloc: error 0"),
    RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    RuntimeError("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("(-4:Insufficient memory) Failed to allocate 1073741824 bytes"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    Fail(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 void* "
        "onnxruntime::BFCArena::AllocateRawInternal() Failed to allocate memory for requested "
        "buffer of size 1207959552"
    ),
    Fail("[ONNXRuntimeError] : 1 : FAIL : bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment: Cannot allocate memory"),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory"),
    ImportError("libgomp-d22c30c5.so.1.0.0: cannot allocate memory in static TLS block"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("the list is not long enough"),
    PeerGone("nobody answers"),
    ModelError("coordinator: CUDA out of memory"),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
def test_every_disguise_is_recognised(error: Exception) -> None:
    """As it is, and as the reason of an error of ours."""
    assert is_out_of_memory(error)
    wrapped = DataError(f"data.jsonl: cannot be read: {error}")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def hide(error: Exception) -> None:
    """Fail while an error is handled, and say nothing of it."""
    try:
        raise error
    except Exception:  # noqa: BLE001 - as libraries do
        raise RuntimeError("the tokenizer gave up")  # noqa: B904


def test_what_came_of_it_is_recognised_too() -> None:
    """Libraries replace errors by their own, and seldom say so."""
    with pytest.raises(RuntimeError) as caught:
        hide(MemoryError())

    assert is_out_of_memory(caught.value)


def test_a_file_that_finds_no_memory_is_no_full_disk() -> None:
    """Writing a checkpoint may be what runs out of memory."""
    with pytest.raises(StorageError) as no_memory, storage_errors("checkpoint"):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(StorageError) as full, storage_errors("checkpoint"):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert is_out_of_memory(no_memory.value)
    assert not is_out_of_memory(full.value)


def ask_torch() -> None:
    """Ask torch's allocator for more than there is."""
    import torch

    torch.empty(1 << 46)


@pytest.mark.parametrize("ask", [ask_torch, lambda: np.empty(1 << 48)], ids=["torch", "numpy"])
def test_the_libraries_here_say_it_so(ask: Callable[[], None]) -> None:
    """What the installed versions raise, whatever that is by now."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the question
        ask()

    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    """Nor is what the coordinator says of itself."""
    assert not is_out_of_memory(error)


def test_a_circle_of_causes_ends() -> None:
    """Errors that name each other as the cause are looked at once."""
    first, second = EdgeError("a"), EdgeError("b")
    first.__cause__, second.__cause__ = second, first

    assert not is_out_of_memory(first)
