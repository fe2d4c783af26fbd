"""Addresses as people write them: `tcp://HOST:PORT`, and HOST:PORT of what a browser opens.

Nothing is resolved and nothing dialled here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

_ADDRESS = re.compile(r"tcp://(?:\[([^\]\s]+)\]|([^:/\[\]\s]+)):(\d+|\*)")
_BARE = re.compile(r"(?:[a-z]+:/*)?(\[[^\]\s]+\]|[^:/\[\]\s]+)(?::(\d+|\*))?/*")
DEFAULT_PORT = 7070
_WEB_ADDRESS = re.compile(r"(?:http://)?(?:\[([0-9a-fA-F:.]+)\]|([^:/\[\]\s]+)):(\d{1,5})/?")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# What the page's token is named in, and what becomes of it where it is not there.
PAGE_TOKEN = "page_token (it is made where there is none)"


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


# ---- for browsers and Prometheus ----


class WebAddress(NamedTuple):
    """Host and port as a socket takes them."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: whoever answers to it
            return False

    @property
    def url(self) -> str:
        """What a browser on this machine opens."""
        host = _EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def is_named_by(self, header: str) -> bool:
        """Return whether a request's Host is this address, or this machine's loopback.

        The name of another site may lead here, too, and then a browser gives that site's scripts
        what we answer; where everybody needs a token, it does not have to be asked.
        """
        name = header if header.endswith("]") else header.rsplit(":", 1)[0]
        own = {self.host.lower(), "localhost", "127.0.0.1", "::1"}
        return name.strip("[]").lower() in own


def web_address(key: str, text: str, *, has_token: bool, token: str = PAGE_TOKEN) -> WebAddress:
    """Return what *text* means.

    Args:
        key: Where it stands, for messages.
        text: HOST:PORT; `*` is every address of this machine, port 0 any.
        has_token: Whether those who come must know a token.
        token: What names the file of that token, for messages.

    Raises:
        ValueError: it is no HOST:PORT, or others can reach it and nothing says who may look.
    """
    match = _WEB_ADDRESS.fullmatch(text.strip())
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"{key} must be HOST:PORT, as 127.0.0.1:7071, got {text!r}")
    host = (match[1] or match[2]).replace("*", "0.0.0.0")
    found = WebAddress(host, int(match[3]))
    if not (found.is_loopback or has_token):
        raise ValueError(
            f"{key}: others can reach {text!r}: name a file for a token with {token}, or listen "
            "at 127.0.0.1 and come by `ssh -L`"
        )
    return found
