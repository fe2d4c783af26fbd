"""Who may look at the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.page.access import COOKIE, LEAST_LETTERS, Access, read_token
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import WebAddress

HERE = WebAddress("127.0.0.1", 7071)


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


def test_who_knows_the_token_may_come_by_any_name() -> None:
    """Without one only names of ours lead here: another site's may point to this machine."""
    assert not Access(HERE, None).is_ours("evil.example:7071")
    assert Access(HERE, None).is_ours("localhost:7071")
    assert Access(HERE, "one-token-of-ours-1").is_ours("the.lab.example:7071")
