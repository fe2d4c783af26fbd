"""A user who is a number without a home is lent one; everybody else keeps their own."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk import home

NOBODYS = 61_234
"""A number that no user of a machine has."""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files go elsewhere, and nothing is remembered."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home.lent_home.cache_clear()
    yield
    home.lent_home.cache_clear()


def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this user be unknown to the system."""
    monkeypatch.setattr(home, "_entry", lambda: None)


def test_a_home_of_ones_own_is_kept(tmp_path: Path) -> None:
    """Nothing is changed where there is one."""
    environment = {"HOME": str(tmp_path), "USER": "me"}

    assert home.lend_home(environment) is None
    assert environment == {"HOME": str(tmp_path), "USER": "me"}


@pytest.mark.parametrize("told", [None, "", "/nowhere", "relative"])
def test_somebody_without_a_home_gets_a_private_one(
    told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same at each start, for its owner alone; and a name, for whoever asks."""
    as_nobody(monkeypatch)
    environment = {} if told is None else {"HOME": told}

    lent = home.lend_home(environment)

    assert lent is not None
    assert lent.parent == tmp_path
    assert stat.S_IMODE(lent.stat().st_mode) == 0o700
    assert environment == {"HOME": str(lent), "USER": f"uid-{os.getuid()}"}
    home.lent_home.cache_clear()
    assert home.lend_home({}) == lent


def test_a_folder_of_somebody_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A link, or a folder that others may write, was put there to be fallen for."""
    as_nobody(monkeypatch)
    trap = tmp_path / f"edgesplit-home-{os.getuid()}"
    trap.symlink_to(tmp_path)
    linked = home.lend_home({})
    home.lent_home.cache_clear()
    trap.unlink()
    trap.mkdir()
    trap.chmod(0o777)

    opened = home.lend_home({})

    for found in (linked, opened):
        assert found is not None
        assert found != trap
        assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_caches_go_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """XDG_CACHE_HOME where it is a path, .cache at home, .cache of a home that was lent."""
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = home.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    told = home.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/nowhere")
    as_nobody(monkeypatch)

    lent = home.cache_folder()

    assert (at_home, told) == (tmp_path / ".cache", Path("/elsewhere"))
    assert lent == tmp_path / f"edgesplit-home-{os.getuid()}" / ".cache"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("has_cache", [False, True])
def test_a_home_that_can_only_be_read_is_one_if_it_has_a_cache(
    has_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that lie there are found; without a cache nothing could be kept."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    with tempfile.TemporaryDirectory() as place:
        shown, scratch = Path(place) / "home", Path(place) / "scratch"
        (shown / ".cache").mkdir(parents=True) if has_cache else shown.mkdir()
        scratch.mkdir()
        scratch.chmod(0o777)
        Path(place).chmod(0o755)
        tempfile.tempdir = str(scratch)

        child = os.fork()
        if child == 0:
            os.setgid(NOBODYS)
            os.setuid(NOBODYS)
            environment = {"HOME": str(shown)}
            is_kept = home.lend_home(environment) is None
            is_right = (is_kept, environment["USER"]) == (has_cache, f"uid-{NOBODYS}")
            os._exit(0 if is_right else 1)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
