"""The page beside a run: a process of its own, which costs the run nothing and ends with it."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coordinator.page.access import read_token
from coordinator.page.listening import listen, require_page
from coordinator.results.events.event import RunEvent, Watcher
from coordinator.results.events.run import FolderKnown, Preparing
from coordinator.results.watchers import Watchers
from edge_sdk.transport.addresses import WebAddress, web_address

log = logging.getLogger(__name__)

# Seconds for the page to end by itself.
END_S = 2.0


class PageBeside:
    """Starts the page once the run's folder is there: a watcher. What becomes of it ends nothing.

    It holds the socket from the start, so that an address that is taken shows before a run begins.
    """

    def __init__(self, address: WebAddress, token: Path | None) -> None:
        self._address, self._token = address, token
        self._socket: socket.socket | None = listen(address, "page")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it can be seen, the port being the one that was found."""
        port = self._address.port if self._socket is None else self._socket.getsockname()[1]
        return self._address._replace(port=port).url

    def see(self, event: RunEvent) -> None:
        """Start it with the folder; note once where it has ended before the run."""
        if self._process is not None and self._process.poll() is not None:
            log.warning("page.ended code=%s", self._process.returncode)
            self._let_go()
        if isinstance(event, FolderKnown) and self._socket is not None:
            sock, self._socket = self._socket, None
            command = [sys.executable, "-m", "coordinator.page.serving", str(event.folder)]
            command += [str(sock.fileno()), self._address.host]
            command += [] if self._token is None else ["--token", str(self._token)]
            with sock:
                try:
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[sock.fileno()],
                        start_new_session=True,  # Ctrl-C is meant for the run, which ends it
                    )
                except OSError as error:
                    log.warning("page.not_started reason=%s", error)

    def _let_go(self) -> None:
        """End its standard input, with which it ends."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._process = None

    def close(self) -> None:
        """Let it end."""
        if self._socket is not None:
            self._socket.close()
        process = self._process
        if process is None:
            return
        self._let_go()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def page_beside(address: str | None, token: Path | None, watcher: Watcher) -> Iterator[Watcher]:
    """Return *watcher* with a page beside it, where there is an address for one.

    Raises:
        ConfigError: nothing can listen there, a package is missing, or the token is no use.
    """
    if address is None:
        yield watcher
        return
    require_page("page")
    found = web_address("page", address, has_token=token is not None)
    if token is not None:
        read_token(token)
    beside = PageBeside(found, token)
    try:
        watcher.see(Preparing(f"page: {beside.url}" + _told_token(token)))
        yield Watchers([watcher, beside])
    finally:
        beside.close()


def _told_token(token: Path | None) -> str:
    return "" if token is None else f" (its token is in {token})"
