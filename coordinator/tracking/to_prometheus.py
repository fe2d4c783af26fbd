"""Numbers as Prometheus reads them: the newest of each, over HTTP at `/metrics`.

On loopback for everybody who comes by a name of ours; anywhere else for whoever has the token.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from coordinator.config.run import ServeConfig
from coordinator.tracking.names import DEVICE_NUMBERS, RUN_NUMBERS, Moment, Number, TrackedRun
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import WebAddress

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PATH = "/metrics"
LEAST_TOKEN = 16
# Readers at once, and those of one address beyond this machine: one Prometheus asks every few
# seconds. More are shut out, and each has so many seconds for question and answer together.
MOST_READERS, MOST_OF_ONE, READER_S = 8, 4, 5.0


def check_token(config: ServeConfig) -> None:
    """Make sure that the token can be read, where there is one.

    Raises:
        ConfigError: it cannot, or is too short.
    """
    if config.tracking.prometheus_token is not None:
        read_token(config.tracking.prometheus_token)


def read_token(path: Path) -> bytes:
    """Return the token in a file.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"tracking.prometheus_token: {path}: {error.strerror}") from error
    if len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"tracking.prometheus_token: {path} must hold at least {LEAST_TOKEN} characters, got "
            f"{len(token)}"
        )
    return token


def metric_name(number: str, *, of_device: bool) -> str:
    """Return what a number is called here, less the `_total` of what only grows."""
    return f"edgesplit_{'device_' if of_device else ''}{number.replace('/', '_')}"


class PrometheusPage:
    """Serves the newest numbers until the run ends."""

    takes_live = True

    def open(self, about: TrackedRun) -> None:
        """Begin to listen."""
        settings = about.config.tracking
        path = settings.prometheus_token
        token = None if path is None else read_token(path)
        self._newest = _Newest(about)
        place = settings.prometheus_place
        self._server = _serve(place, _page(self._newest, token, place))

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def take(self, samples: Sequence[Moment]) -> None:
        """Let newer numbers stand for older ones."""
        self._newest.take(number for sample in samples for number in sample.numbers)

    def close(self, *, completed: bool) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def abandon(self) -> None:
        """Do nothing: none of its threads keeps a program."""


class _Newest:
    """The newest of each number; any thread may ask for them."""

    def __init__(self, about: TrackedRun) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str | None], float] = {}
        self._run = about.name
        self._model = str(about.facts.get("model", ""))

    def take(self, numbers: Iterable[Number]) -> None:
        """Let *numbers* stand for older ones."""
        with self._lock:
            for number in numbers:
                self._values[number.name, number.device] = number.value

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is known, as prometheus_client asks for it."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            values = dict(self._values)
        about = GaugeMetricFamily("edgesplit_run_info", "The run", labels=["run", "model"])
        about.add_metric([self._run, self._model], 1.0)
        yield about
        yield from self._families(values, of_device=False)
        yield from self._families(values, of_device=True)

    def _families(
        self, values: Mapping[tuple[str, str | None], float], *, of_device: bool
    ) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, meaning in (DEVICE_NUMBERS if of_device else RUN_NUMBERS).items():
            kind: Any = CounterMetricFamily if meaning.is_total else GaugeMetricFamily
            labels = ["run", "device"] if of_device else ["run"]
            family = kind(metric_name(name, of_device=of_device), meaning.text, labels=labels)
            for (own, device), value in sorted(values.items(), key=str):
                if own == name and (device is not None) == of_device:
                    family.add_metric([self._run, *([device] if device else [])], value)
            if family.samples:
                yield family


def _page(newest: _Newest, token: bytes | None, own: WebAddress) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application with one page, at the address *own*."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

    registry = CollectorRegistry()
    registry.register(newest)
    wanted = None if token is None else b"Bearer " + token

    def answer(environ: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if wanted is None and not own.is_named_by(str(environ.get("HTTP_HOST", ""))):
            start("421 Misdirected Request", [("Content-Type", "text/plain")])
            return [b"unknown host\n"]
        given = str(environ.get("HTTP_AUTHORIZATION", "")).encode("latin-1", "replace")
        if wanted is not None and not hmac.compare_digest(given, wanted):
            start("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"a token is needed: docs/monitoring.md\n"]
        if environ.get("PATH_INFO") != PATH or environ.get("REQUEST_METHOD") != "GET":
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there is only /metrics\n"]
        start("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
        return [generate_latest(registry)]

    return answer


class _Hurried(io.RawIOBase):
    """A connection whose reads and writes all end by one time."""

    def __init__(self, connection: socket.socket, until_s: float) -> None:
        super().__init__()
        self._connection, self._until_s = connection, until_s

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come; wait no longer than that time."""
        self._hurry()
        return self._connection.recv_into(buffer)

    def write(self, data: Any) -> int:
        """Write all of it by that time."""
        self._hurry()
        self._connection.sendall(data)
        return len(data)

    def _hurry(self) -> None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0.0:
            raise TimeoutError
        self._connection.settimeout(left_s)


class _Handler(WSGIRequestHandler):
    """Says nothing on the terminal, and waits for nobody."""

    def setup(self) -> None:
        """Let question and answer have one deadline, however slowly their bytes come and go."""
        super().setup()
        self.rfile.close()
        stream = _Hurried(self.connection, time.monotonic() + READER_S)
        self.rfile, self.wfile = io.BufferedReader(stream), cast(Any, stream)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each reader, up to a bound."""

    daemon_threads = True
    request_queue_size = 64
    block_on_close = False

    def __init__(self, place: tuple[str, int]) -> None:
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who we are."""
        import socketserver

        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there is one left."""
        if self._has_room(client_address[0]):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._readers -= Counter([client_address[0]])

    def _has_room(self, address: str) -> bool:
        """Count one more reader if there may be one."""
        is_own = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        with self._lock:
            if self._readers.total() >= MOST_READERS or (
                self._readers[address] >= MOST_OF_ONE and not is_own
            ):
                return False
            self._readers[address] += 1
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a reader that leaves is none of the run's business."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _serve(place: tuple[str, int], page: Callable[..., Iterable[bytes]]) -> _Server:
    try:
        server = (_Server6 if ":" in place[0] else _Server)(place)
    except OSError as error:
        raise ConfigError(
            f"tracking.prometheus_address: {place[0]}:{place[1]}: {error.strerror or error}"
        ) from error
    server.set_app(page)
    threading.Thread(
        target=server.serve_forever, args=(0.1,), name="edgesplit-metrics", daemon=True
    ).start()
    return server
