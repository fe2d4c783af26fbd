"""Streams whose copies are made as late as their order allows: what waits for too little is seen.

On a GPU a missing wait shows now and then. Here a copy that is begun on a stream is made only when
somebody waits for it, and reads what its source holds by then; page-locked memory that is free is
given out again at once, overwritten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GARBAGE = -77


class LateEvent:
    """A place in a stream's order."""

    def __init__(self, stream: LateStream, number: int) -> None:
        self._stream, self._number = stream, number

    def query(self) -> bool:
        """Whether all before it has been made."""
        return self._stream.made >= self._number

    def synchronize(self) -> None:
        """Make all before it."""
        self._stream.make_until(self._number)


class LateStream:
    """Work that waits until it is asked for."""

    def __init__(self) -> None:
        self.made = self._begun = 0
        self._work: deque[Callable[[], None]] = deque()

    def begin(self, work: Callable[[], None]) -> None:
        """Put work at the end."""
        self._work.append(work)
        self._begun += 1

    def make_until(self, number: int) -> None:
        """Do the work before place *number*."""
        while self.made < number:
            self._work.popleft()()
            self.made += 1

    def wait_event(self, event: Any) -> None:
        """Let what comes later wait for *event*."""
        self.begin(event.synchronize)

    def record_event(self) -> LateEvent:
        """Return the place after all that was begun."""
        return LateEvent(self, self._begun)


class Computing(LateStream):
    """The stream of whoever computes: what it waits for is made at once, as it reads at once."""

    def wait_event(self, event: Any) -> None:
        """Make what it waits for."""
        event.synchronize()


class LateStreams:
    """Streams of a device that is the CPU, see `Streams`; counts what is asked of it."""

    def __init__(self) -> None:
        self.computing = Computing()
        self._stack: list[LateStream] = [self.computing]
        self.held: list[tuple[torch.Tensor, LateStream]] = []
        """Tensors whose memory was said to be in use on another stream."""
        self.num_pinned = 0

    def make(self) -> LateStream:
        """A new stream."""
        return LateStream()

    def current(self) -> LateStream:
        """Where work is begun now."""
        return self._stack[-1]

    @contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:
        """Begin work on *stream*: copies are put off."""
        self._stack.append(stream)
        try:
            with _PutOff(stream):
                yield
        finally:
            self._stack.pop()

    def hold(self, tensor: torch.Tensor, stream: Any) -> None:
        """Note it."""
        self.held.append((tensor, stream))

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory full of garbage."""
        self.num_pinned += 1
        return torch.full(shape, GARBAGE, dtype=dtype)


class _PutOff(TorchDispatchMode):
    """Puts copies off until their stream gets to them."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return torch.full(args[0], GARBAGE, **given)
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            memory = target.detach()  # *target* may become part of a graph meanwhile
            self._stream.begin(lambda: memory.copy_(source))
            if not (given.get("non_blocking") or args[2:] == (True,)):
                self._stream.record_event().synchronize()
            return target
        return func(*args, **given)
