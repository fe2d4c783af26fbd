"""Where caches go, and a home for libraries where a user has none: a number in a container.

Docker gives such a user the home `/`, which is not theirs; elsewhere there may be none at all. What
libraries then make of `~/.cache` is an error, or a folder called `~`.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from edge_sdk.files import storage_errors

try:
    import pwd
except ModuleNotFoundError:  # another kind of system, where everybody has a home
    pwd = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Return the folder for what can be had again: XDG_CACHE_HOME, or .cache at home."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(told):  # others are to be ignored, the specification says
        return Path(told)
    own = _own_home(os.environ)
    return (lent_home() if own is None else own) / ".cache"


def lend_home(environment: MutableMapping[str, str]) -> Path | None:
    """Give libraries a home where the user has none; returns it, or None where there is one.

    Args:
        environment: That of this process; call it before a library is imported.

    Raises:
        StorageError: there is no place for temporary files.
    """
    if pwd is None:  # pragma: no cover
        return None
    if not environment.get("USER") and not environment.get("LOGNAME") and _entry() is None:
        environment["USER"] = f"uid-{os.getuid()}"  # getpass.getuser() would fail
    if _own_home(environment) is not None:
        return None
    folder = lent_home()
    environment["HOME"] = str(folder)
    return folder


@cache
def lent_home() -> Path:
    """Return a folder of this user's alone among the temporary files, the same at each start.

    Raises:
        StorageError: there is no place for temporary files.
    """
    with storage_errors("temporary files"):
        folder = Path(tempfile.gettempdir()) / f"edgesplit-home-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if is_ours and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="edgesplit-home-"))  # somebody else's has that name


def _own_home(environment: MutableMapping[str, str]) -> Path | None:
    """Return the user's home, if anything can be kept there; also one that can only be read."""
    if pwd is None:  # pragma: no cover
        return Path.home()
    entry = _entry()
    named = environment.get("HOME") or ("" if entry is None else entry.pw_dir)
    home = Path(named)
    if not home.is_absolute() or not home.is_dir():
        return None
    is_writable = os.access(home, os.W_OK | os.X_OK)
    return home if is_writable or (home / ".cache").is_dir() else None


def _entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None
