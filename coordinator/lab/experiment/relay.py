"""A TCP relay that behaves like a link: rates, delay, jitter, cuts. It needs no rights.

    device --> Relay.port --> [rate] --> [delay] --> coordinator      and the same way back

Both directions have a rate of their own, shared fairly by all connections. What has passed the
rate waits for the delay, in order. TCP hides loss behind resends, so loss is not emulated: choose
lower rates instead. Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# A piece is what a link carries in so many seconds: small enough that connections take turns and
# that a new rate is felt at once. The least is an Ethernet frame, the most what is read at once.
PIECE_S = 0.01
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 1460, 64 * 1024
# A link that was idle carries at once what it would have carried in so many seconds. A thread that
# woke late, as threads do on a busy machine, catches up on all of it, so that the rate holds.
BURST_S = 0.003
# Shorter sleeps last longer than they should, so they are added to that of the next piece.
LEAST_SLEEP_S = 0.001
# Most pieces on their way: at 10 ms each they are 10 s. With more the sender has to wait.
MOST_PIECES = 1000
# Less than the kernel's default, as data should wait at the sender.
SOCKET_BUFFER_BYTES = 256 * 1024
DIAL_S = 10.0

_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# Seconds after which connections that are still there are dropped once more.
DROP_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """How a link behaves; without arguments, as if it were not there."""

    up_bytes_per_s: float = math.inf
    """Rate to the coordinator."""
    down_bytes_per_s: float = math.inf
    delay_s: float = 0.0
    """Delay one way, in seconds: half a round trip."""
    jitter_s: float = 0.0
    """Most seconds that a piece is delayed in addition; the order stays."""

    def __post_init__(self) -> None:
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("delay_s", "jitter_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class LinkUsage:
    """What has gone through a relay since it was made."""

    bytes_up: int
    bytes_down: int
    up_s: float
    """Seconds in which the way up was busy, at the rates that it had then."""
    down_s: float
    num_connections: int


class _Lane:
    """One direction: all its connections share one rate."""

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate = rate
        self._turn = asyncio.Lock()  # first come, first served: one piece each
        self._free_s = 0.0
        self._late_s = 0.0
        """Seconds by which the last sleep was too long and that have not been caught up on."""
        self.num_bytes = 0
        self.busy_s = 0.0

    def piece_bytes(self) -> int:
        piece = self._rate() * PIECE_S
        return int(min(max(piece, LEAST_PIECE_BYTES), MOST_PIECE_BYTES))

    async def carry(self, num_bytes: int) -> None:
        """Wait until the link has carried so many bytes."""
        async with self._turn:
            now_s = time.monotonic()
            seconds = num_bytes / self._rate()
            self._free_s = max(self._free_s, now_s - max(BURST_S, self._late_s)) + seconds
            self.num_bytes += num_bytes
            self.busy_s += seconds
            if self._free_s - now_s > LEAST_SLEEP_S:
                await asyncio.sleep(self._free_s - now_s)
                self._late_s = time.monotonic() - self._free_s
            else:
                self._late_s = min(self._late_s, now_s - self._free_s)


class Relay(contextlib.AbstractContextManager["Relay"]):
    """Listens at `port` and passes everything on to where it is aimed, in a thread of its own.

    Any thread may call any method. Without an aim, or while the other side cannot be reached,
    connections are closed at once, as by a host where nobody listens.

    Args:
        shape: How the link behaves.
        host: Address to listen at.
        seed: Seed of the jitter.
    """

    def __init__(
        self, shape: LinkShape | None = None, *, host: str = "127.0.0.1", seed: int = 0
    ) -> None:
        self._shape = shape or LinkShape()
        self._target: tuple[str, int] | None = None
        self._random = random.Random(seed)
        self._listener = socket.create_server((host, 0), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[asyncio.Future[None]] = set()
        self._num_connections = 0
        self._cuts = 0
        """Number of cuts that have not ended; they may overlap."""
        self._timers: list[asyncio.TimerHandle] = []
        """Timers that end cuts."""
        self._loop = asyncio.new_event_loop()
        self._up = _Lane(lambda: self._shape.up_bytes_per_s)
        self._down = _Lane(lambda: self._shape.down_bytes_per_s)
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="edgesplit-relay", daemon=True)
        self._thread.start()

    # ---- from any thread ----

    def aim(self, host: str, port: int) -> None:
        """Connect new connections to *host*:*port* from now on."""
        self._target = (host, port)

    def reshape(self, shape: LinkShape) -> None:
        """Become another link; what is under way keeps its delay."""
        self._shape = shape

    def cut(self, seconds: float | None = None) -> None:
        """Let nothing pass for *seconds*, or until `mend`; neither side is told."""
        self._call(lambda: self._cut(seconds))

    def mend(self) -> None:
        """End all cuts; connections go on where they stopped."""
        self._call(self._mend)

    def drop(self) -> None:
        """Reset all connections; what was under way is lost."""
        self._call(self._drop)

    def usage(self) -> LinkUsage:
        """Return what has gone through since the start."""
        up, down = self._up, self._down
        return LinkUsage(
            up.num_bytes, down.num_bytes, up.busy_s, down.busy_s, self._num_connections
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections and stop listening."""
        if self._thread.is_alive():
            self._call(self._end.set)
            self._thread.join()

    def _call(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(action)

    # ---- in the relay's thread ----

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        # Not `sock_accept`: cancelled at the wrong moment it loses a connection and leaves it open.
        self._loop.add_reader(self._listener, self._accept)
        await self._end.wait()
        self._loop.remove_reader(self._listener)
        while self._connections:  # a task that is just being connected may miss a cancellation
            self._drop()
            await asyncio.wait(set(self._connections), timeout=DROP_AGAIN_S)
        self._listener.close()
        await asyncio.sleep(0)  # aborted connections are closed in the loop's next turn

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:  # gone before its turn
            return
        peer.setblocking(False)
        self._num_connections += 1
        task = asyncio.ensure_future(self._serve(peer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        # Needed for a task that is cancelled before it has begun; otherwise it does nothing.
        task.add_done_callback(lambda _: peer.close())

    def _cut(self, seconds: float | None) -> None:
        self._cuts += 1
        self._is_open.clear()
        if seconds is not None:
            self._timers.append(self._loop.call_later(seconds, self._end_one_cut))

    def _end_one_cut(self) -> None:
        self._cuts = max(0, self._cuts - 1)
        if not self._cuts:
            self._is_open.set()

    def _mend(self) -> None:
        for timer in self._timers:  # else they would end later cuts
            timer.cancel()
        self._timers.clear()
        self._cuts = 0
        self._is_open.set()

    def _drop(self) -> None:
        for task in self._connections:
            task.cancel()

    async def _serve(self, peer: socket.socket) -> None:
        near = await asyncio.open_connection(sock=peer, limit=MOST_PIECE_BYTES)
        writers = [near[1]]
        try:
            await self._is_open.wait()
            if self._target is not None:
                far = await asyncio.wait_for(_dial(*self._target), DIAL_S)
                writers.append(far[1])
                await self._exchange(near, far)
            for writer in writers:
                writer.close()
                await writer.wait_closed()  # what is still buffered goes out first
        except (OSError, asyncio.TimeoutError):
            pass  # one side has failed; a reset tells the other
        finally:
            for writer in writers:
                _reset(writer)

    async def _exchange(self, near: _Ends, far: _Ends) -> None:
        """Pass on what comes, both ways, until both have ended."""
        tasks = [*self._way(near[0], far[1], self._up), *self._way(far[0], near[1], self._down)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: _Lane
    ) -> list[asyncio.Future[None]]:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_PIECES)
        return [
            asyncio.ensure_future(self._collect(reader, under_way, lane)),
            asyncio.ensure_future(self._deliver(under_way, writer)),
        ]

    async def _collect(
        self,
        reader: asyncio.StreamReader,
        under_way: asyncio.Queue[tuple[float, bytes]],
        lane: _Lane,
    ) -> None:
        piece = b"-"
        while piece:
            piece = await reader.read(lane.piece_bytes())
            await self._is_open.wait()
            await lane.carry(len(piece))
            await under_way.put((self._arrival_s(), piece))

    def _arrival_s(self) -> float:
        shape = self._shape
        jitter_s = self._random.uniform(0.0, shape.jitter_s) if shape.jitter_s else 0.0
        return time.monotonic() + shape.delay_s + jitter_s

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            arrival_s, piece = await under_way.get()
            if (wait_s := arrival_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await self._is_open.wait()
            if not piece:
                writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()


async def _dial(host: str, port: int) -> _Ends:
    reader, writer = await asyncio.open_connection(host, port, limit=MOST_PIECE_BYTES)
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    return reader, writer


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection that has not ended by itself, so that the other side knows."""
    if not writer.is_closing():
        raw: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
