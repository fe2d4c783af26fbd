"""Copies between the host and the device that computes, hidden behind what it computes meanwhile.

A plain copy from or to CUDA stops the thread that asks for it until all the work begun before is
done, and nothing new is begun in that time. `StreamTransfers` copies through page-locked memory, on
a stream of its own for each direction: the device goes on computing, and only what needs a copy
waits for it. Where host and device share their memory, as on the CPU, `Transfers` copies nothing.

Knows no model. What streams are is asked of `Streams`, so that their order can be tested without
CUDA.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from edge_sdk.lora.factors import Array

# Page-locked memory cannot be swapped out: this much may be in use at a time for one model. A wave
# of eight devices with 8 MB each is a quarter of it.
MOST_PINNED_BYTES = 256 << 20


class Event(Protocol):
    """A place in the order of a stream's work."""

    def query(self) -> bool:
        """Return whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until all work before it is done."""


class Stream(Protocol):
    """Work of a device that is done in the order in which it was begun."""

    def wait_event(self, event: Any) -> None:
        """Let the work that is begun from now on wait for *event*."""

    def record_event(self) -> Event:
        """Return the place after all the work begun so far."""


class Streams(Protocol):
    """The streams of one device."""

    def make(self) -> Stream:
        """Return a new stream."""

    def current(self) -> Stream:
        """Return the stream on which this thread computes."""

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Let work be begun on *stream*; memory that is taken meanwhile belongs to it."""

    def hold(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Let *tensor*'s memory, which belongs to another stream, outlast what *stream* does now.

        Freed, it would be used again as soon as its own stream is done with it.
        """

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return page-locked host memory; freed, it is used again once no copy needs it."""


class CudaStreams:
    """Those of a CUDA device; torch keeps its page-locked memory until pending copies are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self) -> Any:
        """Return a new stream; see `Streams`."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        """Return the stream on which this thread computes; see `Streams`."""
        return torch.cuda.current_stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Let work be begun on *stream*; see `Streams`."""
        return torch.cuda.stream(stream)

    def hold(self, tensor: torch.Tensor, stream: Any) -> None:
        """Let *tensor*'s memory outlast what *stream* does now; see `Streams`."""
        tensor.record_stream(stream)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return page-locked host memory; see `Streams`."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)


class Arrival:
    """An array on its way to the device."""

    def __init__(
        self, raw: torch.Tensor, streams: Streams | None = None, arrived: Event | None = None
    ) -> None:
        self.raw = raw
        """The tensor, for whoever reads no number of it."""
        self._streams, self._arrived = streams, arrived

    def tensor(self) -> torch.Tensor:
        """Return the tensor; work that is begun from now on waits for it, the thread does not."""
        if self._streams is not None:
            current = self._streams.current()
            current.wait_event(self._arrived)
            self._streams.hold(self.raw, current)
        return self.raw


class Departure:
    """A tensor on its way to the host."""

    def __init__(self, array: Array, done: Event | None = None) -> None:
        self._array, self._done = array, done

    def array(self) -> Array:
        """Wait for it; return the numbers as float32."""
        if self._done is not None:
            self._done.synchronize()
        return self._array


class Transfers:
    """Copies of a device that has no streams: what a copy is needed for waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, array: np.ndarray) -> Arrival:
        """Begin to copy an array to the device; *array* may change when this has returned.

        On the CPU it is the array itself, as a tensor.
        """
        return Arrival(torch.from_numpy(array).to(self.device))

    def download(self, tensor: torch.Tensor) -> Departure:
        """Begin to copy a tensor to the host; nobody may change it before the array is there.

        On the CPU the array shares its memory where it can.
        """
        return Departure(tensor.detach().float().cpu().numpy())


class StreamTransfers(Transfers):
    """Copies on streams of their own, one up and one down, through page-locked memory."""

    def __init__(
        self, device: torch.device, streams: Streams, most_bytes: int = MOST_PINNED_BYTES
    ) -> None:
        """Copy to and from *device*, with at most *most_bytes* of page-locked memory in use."""
        super().__init__(device)
        self._streams = streams
        self._up, self._down = streams.make(), streams.make()
        self._pinned = _Pinned(streams, most_bytes)

    def upload(self, array: np.ndarray) -> Arrival:
        """Begin to copy an array to the device; see `Transfers`."""
        source = torch.from_numpy(np.ascontiguousarray(array))
        host = self._pinned.take(tuple(source.shape), source.dtype)
        if host is not None:
            source = host.copy_(source)
        with self._streams.on(self._up):
            # From ordinary memory not without waiting: whether it is still read later is nowhere
            # promised. This thread then waits for the copies before it, and for no computation.
            raw = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            raw.copy_(source, non_blocking=host is not None)
            arrived = self._up.record_event()
        if host is not None:
            self._pinned.keep(host, arrived)
        return Arrival(raw, self._streams, arrived)

    def download(self, tensor: torch.Tensor) -> Departure:
        """Begin to copy a tensor to the host; see `Transfers`."""
        values = tensor.detach().float()
        host = self._pinned.take(tuple(values.shape), values.dtype)
        if host is None:
            return Departure(values.cpu().numpy())
        array = self._pinned.lend(host)
        self._down.wait_event(self._streams.current().record_event())
        with self._streams.on(self._down):
            host.copy_(values, non_blocking=True)
            done = self._down.record_event()
        self._streams.hold(values, self._down)
        return Departure(array, done)


class _Pinned:
    """Page-locked memory, so much of it at a time; whoever gets none copies from ordinary memory.

    One thread may take while another does.
    """

    def __init__(self, streams: Streams, most_bytes: int) -> None:
        self._streams, self._most_bytes = streams, most_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._read: deque[tuple[torch.Tensor, Event]] = deque()
        """Memory that a copy reads, the oldest first, and when it no longer does."""
        self._back: deque[int] = deque()
        """Bytes of lent memory that nobody holds any more; filled by the garbage collector, which
        may come in any thread and wait for no lock."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return memory of our own; None where too much of it is in use."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        with self._lock:
            while self._read and self._read[0][1].query():
                self._used_bytes -= self._read.popleft()[0].nbytes
            while self._back:
                self._used_bytes -= self._back.popleft()
            if self._used_bytes + num_bytes > self._most_bytes:
                return None
            self._used_bytes += num_bytes
        return self._streams.pinned(shape, dtype)

    def keep(self, host: torch.Tensor, read: Event) -> None:
        """Hold what was taken until a copy has *read* it."""
        with self._lock:
            self._read.append((host, read))

    def lend(self, host: torch.Tensor) -> Array:
        """Return what was taken as an array; it counts until nobody holds it or a view of it."""
        array: Array = host.numpy()
        # Not the array: views hold what it was made of, as it does itself.
        weakref.finalize(array.base, self._back.append, array.nbytes).atexit = False
        return array


def transfers_of(device: torch.device) -> Transfers:
    """Return how arrays get to *device* and back."""
    if device.type == "cuda":
        return StreamTransfers(device, CudaStreams(device))
    return Transfers(device)
