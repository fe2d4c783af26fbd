"""Addresses as people write them: `tcp://HOST:PORT`, told apart from what only looks like one.

Nothing is resolved and nothing dialled here.
"""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"tcp://(?:\[([^\]\s]+)\]|([^:/\[\]\s]+)):(\d+|\*)")
_BARE = re.compile(r"(?:[a-z]+:/*)?(\[[^\]\s]+\]|[^:/\[\]\s]+)(?::(\d+|\*))?/*")
DEFAULT_PORT = 7070


def parse_address(address: str) -> tuple[str, int] | None:
    """Return host and port of a `tcp://HOST:PORT` that can be dialled, None for anything else."""
    match = _ADDRESS.fullmatch(address)
    if match is None or "*" in (match[2], match[3]) or not 0 < int(match[3]) < 65536:
        return None
    return match[1] or match[2], int(match[3])


def check_dialled(key: str, address: str) -> None:
    """Refuse an *address* of *key* that no socket could dial; port 0 is nobody's, and dials no one.

    Raises:
        ValueError: it is no `tcp://HOST:PORT`; the message says what it may have been meant to be.
    """
    _check(key, address, is_listened=False)


def check_listened(key: str, address: str) -> None:
    """Refuse an *address* of *key* at which no socket could listen; `*` is any host, or any port.

    Raises:
        ValueError: as `check_dialled`.
    """
    _check(key, address, is_listened=True)


def _check(key: str, address: str, *, is_listened: bool) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is not None and _is_usable(match, is_listened=is_listened):
        return
    host = "HOST" if not is_listened else "*"
    raise ValueError(
        f"{key} must be tcp://{host}:PORT with a port of 1..65535, got {address!r}{_hint(address)}"
    )


def _is_usable(match: re.Match[str], *, is_listened: bool) -> bool:
    if not is_listened and "*" in (match[2], match[3]):
        return False
    return match[3] == "*" or int(match[3]) < 65536


def _hint(address: str) -> str:
    """Return what was meant, where a scheme or a port is missing and the rest is plain."""
    found = _BARE.fullmatch(address.strip())
    if found is None or address.startswith("tcp://") and found[2]:
        return ""
    return f"; did you mean 'tcp://{found[1]}:{found[2] or DEFAULT_PORT}'?"
