"""`coordinator page RUN`: look at a run, or at several, in a browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from edge_sdk.errors import ConfigError

LISTEN = "127.0.0.1:7071"


def add_page(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    text = "show a run in a browser: one that goes on, or one that has ended"
    page = add_command(commands, "page", text, _page)
    page.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a run, an experiment, or of runs"
    )
    page.add_argument(
        "--listen", default=LISTEN, metavar="HOST:PORT", help="default: %(default)s; port 0: any"
    )
    page.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="token for whoever looks, made where there is none; needed beyond this machine",
    )


def _page(options: argparse.Namespace) -> int:
    from coordinator.page.access import Access, read_token
    from coordinator.page.listening import listen, require_page
    from coordinator.page.runs import Runs
    from coordinator.page.serving import serve_page
    from edge_sdk.transport.addresses import web_address

    require_page("coordinator page")
    token_file = options.token_file
    try:
        has_token = token_file is not None
        address = web_address("--listen", options.listen, has_token=has_token, token="--token-file")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    runs = Runs(options.folder)
    token = None if token_file is None else read_token(token_file)
    with listen(address, "--listen") as sock:
        address = address._replace(port=sock.getsockname()[1])
        told = "" if token is None else f" (the token is in {token_file})"
        sys.stderr.write(f"page of {options.folder}: {address.url}{told}; Ctrl-C ends it\n")
        serve_page(runs, Access(address, token), sock)
    return 0
