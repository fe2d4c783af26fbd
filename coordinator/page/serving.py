"""The page's server: routes, files, events; the only door of Starlette, uvicorn and plotly.

    python -m coordinator.page.serving FOLDER FD HOST    what `beside.py` starts

It writes nothing but the file of a token, knows no run but by its folder, and takes no word from a
browser but the token and the name of a run.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import logging
import os
import resource
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from coordinator.page.access import COOKIE, HEADERS, Access, read_token
from coordinator.page.feed import LOOK_S, RunFeed
from coordinator.page.runs import Runs
from coordinator.page.state import PageState
from edge_sdk.transport.addresses import WebAddress

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

# Who looks at once; more are told to come later.
MOST_VIEWERS = 24
# Connections, with all else that is open: more wait until others are closed.
MOST_FILES = 256
# Seconds for a request to come, and for an answer to be taken; then the connection is cut.
IDLE_S, STALL_S = 10.0, 20.0
MOST_LOGIN_BYTES = 4096
FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "cards.js": "text/javascript",
    "charts.js": "text/javascript",
    "lists.js": "text/javascript",
    "timeline.js": "text/javascript",
    "draw.js": "text/javascript",
}
PLOTLY = "plotly.min.js"
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


@cache
def _own_file(name: str) -> bytes:
    return resources.files("coordinator.page").joinpath("static", name).read_bytes()


@cache
def _plotly() -> bytes:
    """Return plotly's own JavaScript as its package ships it, packed once."""
    path = resources.files("plotly").joinpath("package_data", PLOTLY)
    return gzip.compress(path.read_bytes(), 6)


class PageApp:
    """The application that shows runs to whom *access* lets in."""

    def __init__(self, runs: Runs, access: Access, look_s: float = LOOK_S) -> None:
        from starlette.applications import Starlette
        from starlette.routing import Route

        self._access = access
        site = self._site = _Site(runs, access, look_s)
        self._inner = Starlette(
            routes=[
                Route("/", site.index),
                Route("/login", site.login, methods=["GET", "POST"]),
                Route("/static/{name}", site.static),
                Route("/runs", site.list_runs),
                Route("/state", site.state),
                Route("/events", site.events),
            ]
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; every answer tells the browser what to forbid."""
        from starlette.datastructures import Headers, MutableHeaders

        async def send_forbidding(message: Any) -> None:
            if message["type"] == "http.response.start":
                told = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    told.setdefault(name, value)
            await send(message)

        answer = self._answer(Headers(scope=scope), scope["path"])
        await answer(scope, receive, send_forbidding)

    def _answer(self, headers: Mapping[str, str], path: str) -> Asgi:
        from starlette.responses import PlainTextResponse, RedirectResponse

        if not self._access.is_ours(headers.get("host", "")):
            return PlainTextResponse("unknown host\n", 421)
        if path == "/login" or path.startswith("/static/") or self._access.admits(headers):
            return self._inner
        if path == "/":
            return RedirectResponse("login", 303)
        return PlainTextResponse("the page needs its token\n", 401)

    def close(self) -> None:
        """Let everybody go who watches."""
        self._site.close()


class _Site:
    """What is answered to whom has come in."""

    def __init__(self, runs: Runs, access: Access, look_s: float) -> None:
        self._runs, self._access, self._look_s = runs, access, look_s
        self._feeds: dict[Path, RunFeed] = {}

    def close(self) -> None:
        """Let everybody go who watches."""
        for feed in self._feeds.values():
            feed.close()

    async def index(self, _request: Request) -> Response:
        from starlette.responses import HTMLResponse

        return HTMLResponse(_own_file("index.html"))

    async def static(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse
        from starlette.responses import Response as Answer

        name = request.path_params["name"]
        if name == PLOTLY:
            packed = await asyncio.to_thread(_plotly)
            kept = {"content-encoding": "gzip", "cache-control": "private, max-age=86400"}
            return Answer(packed, media_type="text/javascript", headers=kept)
        if name not in FILES:
            return PlainTextResponse("not found\n", 404)
        return Answer(_own_file(name), media_type=FILES[name])

    async def login(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse, RedirectResponse

        if request.method == "GET":
            return HTMLResponse(_own_file("login.html"))
        token = parse_qs(await _body(request)).get("token", [""])[0]
        if not self._access.knows(token.strip()):
            await asyncio.sleep(1.0)  # whoever tries tokens gets one a second and connection
            return HTMLResponse(_own_file("login.html"), 403)
        found = RedirectResponse("./", 303)
        found.set_cookie(COOKIE, self._access.cookie(), httponly=True, samesite="strict")
        return found

    async def list_runs(self, _request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(await asyncio.to_thread(self._runs.listed))

    def _feed(self, request: Request) -> RunFeed | None:
        path = self._runs.find(request.query_params.get("run"))
        if path is None:
            return None
        for other in [p for p, feed in self._feeds.items() if p != path and not feed.num_viewers]:
            del self._feeds[other]
        return self._feeds.setdefault(path, RunFeed(PageState(path), self._look_s))

    async def state(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse
        from starlette.responses import Response as Answer

        feed = self._feed(request)
        if feed is None:
            return PlainTextResponse("no such run\n", 404)
        await feed.look()
        return Answer(feed.whole(), media_type="application/json")

    async def events(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse

        feed = self._feed(request)
        if feed is None:
            return PlainTextResponse("no such run\n", 404)
        if sum(other.num_viewers for other in self._feeds.values()) >= MOST_VIEWERS:
            return PlainTextResponse("too many look already\n", 503, {"retry-after": "10"})
        return _stream(feed)


def _stream(feed: RunFeed) -> Response:
    """Return the answer that goes on, and lets go of the feed whenever and however it ends."""
    from starlette.responses import StreamingResponse

    messages = feed.messages()

    class _Stream(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await messages.aclose()

    return _Stream(_sse(messages), media_type="text/event-stream")


async def _sse(messages: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield what is new as server-sent events."""
    yield "retry: 2000\n\n"
    async for text in messages:
        yield f"event: state\ndata: {text}\n\n" if text else "event: beat\ndata: \n\n"
    yield "event: end\ndata: \n\n"


async def _body(request: Request) -> str:
    """Return the first bytes of a request's body, if they come in time."""
    found = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            found.extend(piece[:MOST_LOGIN_BYTES])
            if len(found) >= MOST_LOGIN_BYTES:
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), IDLE_S)
    return found[:MOST_LOGIN_BYTES].decode("utf-8", "replace")


# ---- the program ----


def _impatient() -> Any:
    """Return uvicorn's protocol, which cuts off who sends nothing and who takes nothing."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        _idle: Any = None
        _stalled: Any = None
        _seen: Any = "nothing yet"

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def _look(self) -> None:
            """Cut the connection if it has had no request since the last look, and has none."""
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and self._seen is self.cycle:
                self.transport.abort()
                return
            self._seen = self.cycle
            self._idle = self.loop.call_later(IDLE_S, self._look)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled is not None:
                self._stalled.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._idle, self._stalled):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

    return Impatient


def make_server(app: PageApp) -> Any:
    """Return the uvicorn server of *app*: `run(sockets=[...])` serves until `should_exit`."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.close()
            await super().shutdown(sockets)

    # What a browser sends wrong is nobody's news here.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)

    settings: Mapping[str, Any] = {
        "http": _impatient(),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": 1,
    }
    return Server(uvicorn.Config(app, **settings))


def serve_page(runs: Runs, access: Access, sock: socket.socket) -> None:
    """Serve the page at *sock* until Ctrl-C or SIGTERM."""
    make_server(PageApp(runs, access)).run(sockets=[sock])


def _be_modest() -> None:
    """Let the run have the processor and the memory first, and take few files."""
    with suppress(OSError):
        os.nice(10)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, most))


def main(arguments: list[str]) -> int:
    """Serve the page of a run until whoever has started this process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("fd", type=int)
    parser.add_argument("host")
    parser.add_argument("--token", type=Path)
    options = parser.parse_args(arguments)
    _be_modest()
    sock = socket.socket(fileno=options.fd)
    token = None if options.token is None else read_token(options.token)
    address = WebAddress(options.host, sock.getsockname()[1])
    server = make_server(PageApp(Runs(options.folder), Access(address, token)))

    def end_with_run() -> None:
        with suppress(OSError):
            while os.read(0, 1024):  # our standard input ends with the process that holds it
                pass
        server.should_exit = True

    threading.Thread(target=end_with_run, daemon=True).start()
    server.run(sockets=[sock])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
