"""A link that misbehaves on order: a TCP relay on loopback, for devices and their coordinator.

    with Relay(gateway.address) as relay:
        ... let devices connect to relay.address ...
        relay.swallow()  # bytes of these connections are taken and thrown away, new ones work
        relay.heal()

One thread runs it; every method may be called from any other, and has taken effect when it
returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Literal

Direction = Literal["up", "down"]
"""Up leads from whoever connects (a device) to the target (the coordinator)."""
BOTH: tuple[Direction, Direction] = ("up", "down")
# Small, so that a limit of the rate is felt byte by byte, and a pause leaves little under way.
READ_BYTES = 16 * 1024
# With a limit, so much may be on its way in the kernel; a real link has not much more.
LIMITED_BUFFER_BYTES = 64 * 1024
# Closing with this sends a reset, not an end.
_RESET = struct.pack("ii", 1, 0)


class _Connection:
    """One connection: both of its ends, and what becomes of its bytes."""

    def __init__(self) -> None:
        self.ends: list[asyncio.StreamWriter] = []
        self.swallows: set[Direction] = set()
        self.healed = asyncio.Event()
        """Clear while the end of a side must not be seen by the other."""
        self.healed.set()

    def close(self, *, is_reset: bool) -> None:
        """Close both ends at once."""
        self.healed.set()  # there is nothing left to be hidden
        for end in self.ends:
            sock = end.get_extra_info("socket")
            if is_reset and sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()


class Relay(contextlib.AbstractContextManager["Relay"]):
    """A relay to one address, whose connections can be cut, swallowed, paused and slowed down.

    Args:
        target: Where to connect to, `tcp://HOST:PORT`; need not listen yet.
        rate: Bytes a second in each direction, shared by all connections; None for no limit.
        port: Port to listen at; 0 takes a free one.
    """

    def __init__(self, target: str, *, rate: float | None = None, port: int = 0) -> None:
        host, _, number = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(number))
        self._rate = rate
        self._server = socket.create_server(("127.0.0.1", port))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.num_bytes: dict[Direction, int] = {"up": 0, "down": 0}
        """Bytes that were passed on."""
        self.num_swallowed = 0
        """Bytes that were taken and thrown away."""
        self.num_accepted = 0
        """Connections that were taken, those that were refused at once included."""
        self._free_at_s = {"up": 0.0, "down": 0.0}
        self._connections: list[_Connection] = []
        self._swallows_new: set[Direction] = set()
        self._refuses: Literal["", "reset", "hang"] = ""
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    # ---- what a test orders ----

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def cut(self) -> None:
        """Close every connection at once, as a process that ends; new ones work."""
        self._do(lambda: self._close_all(is_reset=False))

    def reset(self) -> None:
        """Reset every connection at once; new ones work."""
        self._do(lambda: self._close_all(is_reset=True))

    def swallow(
        self,
        *,
        existing_only: bool = True,
        directions: tuple[Direction, ...] = BOTH,
        numbers: tuple[int, ...] | None = None,
    ) -> None:
        """Take all bytes and throw them away, and hide that a side has closed its end.

        Args:
            existing_only: Whether new connections work, as with a NAT that lost its state.
            directions: Which bytes.
            numbers: Which of the open connections, in the order in which they came; all if None.
        """

        def do() -> None:
            for number, connection in enumerate(self._connections):
                if numbers is None or number in numbers:
                    connection.swallows.update(directions)
                    connection.healed.clear()
            if not existing_only:
                self._swallows_new.update(directions)

        self._do(do)

    def pause(self) -> None:
        """Pass nothing on and lose nothing, as a link that is down for a while."""
        self._do(self._goes_on.clear)

    def refuse(self, how: Literal["reset", "hang"] = "reset") -> None:
        """Take new connections and reset them at once, or never pass anything on.

        As a container proxy, a tunnel or a load balancer with nobody behind it.
        """

        def do() -> None:
            self._refuses = how

        self._do(do)

    def limit(self, rate: float | None) -> None:
        """Pass on *rate* bytes a second in each direction; None for no limit."""

        def do() -> None:
            self._rate = rate

        self._do(do)

    def heal(self) -> None:
        """Pass bytes on again, in connections that have lost some as well; lift every order.

        Limits of the rate stay. What a swallowed connection has lost stays lost, so that its stream
        may have a hole in the middle of a frame.
        """

        def do() -> None:
            self._refuses = ""
            self._swallows_new.clear()
            self._goes_on.set()
            for connection in self._connections:
                connection.swallows.clear()
                connection.healed.set()

        self._do(do)

    def close(self) -> None:
        """Stop, and close everything."""
        if self._thread.is_alive():
            self._do(self._over.set)
            self._thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the thread ----

    def _do(self, what: Callable[[], None]) -> None:
        """Let the thread do *what*, and wait until it has."""
        done: Future[None] = Future()

        def do() -> None:
            what()
            done.set_result(None)

        self._loop.call_soon_threadsafe(do)
        done.result(10.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._server, limit=READ_BYTES)
        await self._over.wait()
        server.close()
        self._close_all(is_reset=False)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # they may begin others
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _close_all(self, *, is_reset: bool) -> None:
        for connection in self._connections:
            connection.close(is_reset=is_reset)
        self._connections.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection()
        connection.ends.append(writer)
        self.num_accepted += 1
        if self._refuses == "reset":
            connection.close(is_reset=True)
            return
        connection.swallows.update(self._swallows_new)
        if connection.swallows:
            connection.healed.clear()
        self._connections.append(connection)
        try:
            if self._refuses == "hang":
                await self._over.wait()
            self._slow_down(writer)
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=READ_BYTES)
            self._slow_down(far_writer)
            connection.ends.append(far_writer)
            await asyncio.gather(
                self._pass_on(connection, "up", reader, far_writer),
                self._pass_on(connection, "down", far_reader, writer),
            )
        except (OSError, asyncio.CancelledError):  # cancelled: the relay is over
            pass
        finally:
            connection.close(is_reset=False)
            if connection in self._connections:
                self._connections.remove(connection)

    def _slow_down(self, writer: asyncio.StreamWriter) -> None:
        if self._rate is not None:
            sock = writer.get_extra_info("socket")
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, LIMITED_BUFFER_BYTES)
            writer.transport.set_write_buffer_limits(high=READ_BYTES)

    async def _pass_on(
        self,
        connection: _Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while True:
            await self._goes_on.wait()
            try:
                data = await reader.read(READ_BYTES)
            except OSError:
                data = b""
            if not data:
                break
            await self._goes_on.wait()
            if direction in connection.swallows:
                self.num_swallowed += len(data)
                continue
            await self._wait_for_turn(direction, len(data))
            writer.write(data)
            await writer.drain()
            self.num_bytes[direction] += len(data)
        await connection.healed.wait()
        connection.close(is_reset=False)

    async def _wait_for_turn(self, direction: Direction, num_bytes: int) -> None:
        """Wait as long as the link needs for what comes before, and for these bytes."""
        if self._rate is not None:
            now_s = self._loop.time()
            at_s = max(now_s, self._free_at_s[direction]) + num_bytes / self._rate
            self._free_at_s[direction] = at_s
            await asyncio.sleep(at_s - now_s)
