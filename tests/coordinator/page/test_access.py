"""Who may look at the page, and where it may listen at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config.page import PageAddress, page_address
from coordinator.config.run import ServeConfig
from coordinator.page.access import COOKIE, LEAST_LETTERS, Access, read_token
from edge_sdk.errors import ConfigError

HERE = PageAddress("127.0.0.1", 7071)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7071", "127.0.0.1", 7071),
        ("http://localhost:80/", "localhost", 80),
        ("[::1]:7071", "::1", 7071),
        ("127.0.0.2:0", "127.0.0.2", 0),
    ],
)
def test_this_machine_needs_no_token(text: str, host: str, port: int) -> None:
    """What nobody else can reach is taken as it stands."""
    assert page_address("page", text, has_token=False) == (host, port)


@pytest.mark.parametrize(
    "text", ["0.0.0.0:7071", "*:7071", "[::]:7071", "192.168.1.4:7071", "lab:1"]
)
def test_others_need_a_token(text: str) -> None:
    """Where others can reach the page it must be said who may look; with a token it may listen."""
    with pytest.raises(ValueError, match="others can reach"):
        page_address("page", text, has_token=False)

    assert page_address("page", text, has_token=True).port in (7071, 1)


@pytest.mark.parametrize("text", ["7071", "localhost", "tcp://*:7071", "host:99999", "a b:1", ""])
def test_what_is_no_address_is_said(text: str) -> None:
    """The line names the key, and how an address looks."""
    with pytest.raises(ValueError, match=r"page must be HOST:PORT, as 127\.0\.0\.1:7071"):
        page_address("page", text, has_token=True)


def test_a_run_without_a_token_refuses_the_world() -> None:
    """The config itself is refused, before anything listens; without `page` nothing does."""
    with pytest.raises(ValueError, match="page_token"):
        ServeConfig(model="m", page="0.0.0.0:7071")

    assert ServeConfig(model="m").page is None


def test_a_token_is_made_where_there_is_none(tmp_path: Path) -> None:
    """It is long, random, kept for its owner alone, and read again by the next run."""
    path = tmp_path / "page.token"

    token = read_token(path)

    assert len(token) >= 2 * LEAST_LETTERS
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path) == token
    assert read_token(tmp_path / "other.token") != token


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """As a key is: the line says what to do, and the file stays as it was."""
    path = tmp_path / "page.token"
    path.write_text("0123456789abcdefXYZ\n")
    path.chmod(0o644)

    with pytest.raises(ConfigError, match="others can read it; run: chmod 600"):
        read_token(path)

    assert path.stat().st_mode & 0o777 == 0o644


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    """What can be guessed is none; the line does not show it."""
    path = tmp_path / "page.token"
    path.write_text("secret\n")
    path.chmod(0o600)

    with pytest.raises(ConfigError, match="at least 16 letters, got 6") as found:
        read_token(path)
    assert "secret" not in str(found.value)


def test_a_cookie_stands_in_for_the_token() -> None:
    """Only that of this token is taken, and it does not contain it."""
    access, other = Access(HERE, "one-token-of-ours-1"), Access(HERE, "one-token-of-ours-2")

    assert access.admits({"cookie": f"theme=dark; {COOKIE}={access.cookie()}"})
    assert not access.admits({"cookie": f"{COOKIE}={other.cookie()}"})
    assert not access.admits({"cookie": f"{COOKIE}=\xff\x00; ;=;"})
    assert not access.admits({})
    assert "one-token" not in access.cookie()


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:7071", True),
        ("localhost:7071", True),
        ("localhost", True),
        ("[::1]:7071", True),
        ("evil.example:7071", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_without_a_token_only_our_own_names_lead_here(host: str, is_ours: bool) -> None:
    """A name of another site that points to this machine is refused."""
    assert Access(HERE, None).is_ours(host) == is_ours
