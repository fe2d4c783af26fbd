"""Where the page of a run listens, and who may look at it. It opens no socket and no file."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

_ADDRESS = re.compile(r"(?:http://)?(?:\[([0-9a-fA-F:.]+)\]|([^:/\[\]\s]+)):(\d{1,5})/?")


class PageAddress(NamedTuple):
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
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """What a browser on this machine opens."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"


def page_address(key: str, text: str, *, has_token: bool) -> PageAddress:
    """Return what *text* means.

    Raises:
        ValueError: it is no HOST:PORT, or others can reach it and nothing says who may look.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"{key} must be HOST:PORT, as 127.0.0.1:7071, got {text!r}")
    host = (match[1] or match[2]).replace("*", "0.0.0.0")
    found = PageAddress(host, int(match[3]))
    if not (found.is_loopback or has_token):
        raise ValueError(
            f"{key}: others can reach {text!r}: name a file for a token with page_token (it is "
            "made where there is none), or listen at 127.0.0.1 and come by `ssh -L`"
        )
    return found
