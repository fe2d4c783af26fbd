"""Whether an address can be listened at, asked before anything takes long."""

from __future__ import annotations

import errno
import socket

from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import parse_address


def obstacle(listen: str) -> OSError | None:
    """Return what keeps a program from listening at `tcp://HOST:PORT` now; None if nothing does.

    Nothing is known, and None returned, of a port that the system chooses, and of a host that is
    the name of an interface.
    """
    where = parse_address(listen.replace("//*:", "//0.0.0.0:"))
    if where is None:
        return None
    try:
        found = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except socket.gaierror:
        return None
    except OSError as error:
        return error
    return None


def cure(error: OSError, listen: str) -> str:
    """Return what helps against *error*, where something is known."""
    where = parse_address(listen.replace("//*:", "//0.0.0.0:"))
    if error.errno != errno.EADDRINUSE or where is None:
        return ""
    return f"ss -ltnp 'sport = :{where[1]}' shows who; or listen=tcp://*:PORT"


def require_free_port(listen: str) -> None:
    """Refuse an address that cannot be listened at.

    Raises:
        ConfigError: as the gateway itself would.
    """
    if (error := obstacle(listen)) is not None:
        help_ = f"; {text}" if (text := cure(error, listen)) else ""
        raise ConfigError(f"cannot listen at {listen}: {error.strerror or error}{help_}")
