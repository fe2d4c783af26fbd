"""What a page needs before anything else: its packages, and a socket that listens."""

from __future__ import annotations

import socket
from importlib import util

from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import WebAddress

NEEDS = ("starlette", "uvicorn", "plotly")


def require_page(key: str) -> None:
    """Refuse what nothing here can serve.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [name for name in NEEDS if util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{key}: {', '.join(missing)} missing here; pip install 'edgesplit[page]'"
        )


def listen(address: WebAddress, key: str) -> socket.socket:
    """Return a socket that listens, so that whatever is wrong shows before a run begins.

    Raises:
        ConfigError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((address.host, address.port))
        found.listen(64)
    except OSError as error:
        found.close()
        where = f"{address.host}:{address.port}"
        raise ConfigError(f"{key}: cannot listen at {where}: {error.strerror or error}") from error
    return found
