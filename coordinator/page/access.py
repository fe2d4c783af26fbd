"""Who may look at the page, and what every answer tells the browser to forbid."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from edge_sdk.errors import ConfigError
from edge_sdk.files import atomic_write
from edge_sdk.transport.addresses import WebAddress

COOKIE = "edgesplit_page"
# Letters of a token: one of fewer could be guessed by trying.
LEAST_LETTERS = 16
# Nothing runs, is styled, loaded or sent but what this page itself serves; nobody may frame it.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


def read_token(path: Path) -> str:
    """Return the token in a file of its owner's alone, which is made where there is none.

    Raises:
        ConfigError: it cannot be read, is too short, or others may read it.
        StorageError: it cannot be written.
    """
    if not path.exists():
        atomic_write(path, secrets.token_urlsafe(24) + "\n")
    try:
        token, mode = path.read_text(encoding="utf-8").strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"page_token {path}: cannot be read: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"page_token {path}: others can read it; run: chmod 600 {path}")
    if len(token) < LEAST_LETTERS:
        raise ConfigError(
            f"page_token {path}: a token has at least {LEAST_LETTERS} letters, got {len(token)}; "
            "remove the file, and one is made"
        )
    return token


class Access:
    """Lets in who comes by a name of ours and, where there is a token, knows it."""

    def __init__(self, address: WebAddress, token: str | None) -> None:
        self._address, self._token = address, token

    def is_ours(self, host: str) -> bool:
        """Return whether a request's Host is this page; who knows the token may use any name."""
        return self._token is not None or self._address.is_named_by(host)

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request may see the page, by its cookie or `Authorization: Bearer`."""
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.knows(given.strip())
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return found is not None and _equal(found.value, self.cookie())

    def knows(self, token: str) -> bool:
        """Return whether *token* is the one, in a time that tells nothing of it."""
        return self._token is None or _equal(token, self._token)

    def cookie(self) -> str:
        """Return what a browser keeps in place of the token."""
        return hashlib.sha256(f"edgesplit page {self._token}".encode()).hexdigest()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))
