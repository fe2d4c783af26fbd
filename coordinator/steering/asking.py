"""The mouth of another shell: say a wish to the process that holds a run, and wait for the end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.results.run_lock import holder, is_held
from coordinator.steering.socket_path import socket_path
from coordinator.steering.wishes import Wish, encode
from edge_sdk.errors import ConfigError, EdgeError

# Seconds in which a run that is held has to listen: it may be reading its model.
LISTENS_S, AGAIN_S = 60.0, 0.1
# Seconds for the process to let go of the run once it has answered.
LETS_GO_S = 10.0
# Seconds in which a wish has to be taken.
TAKEN_S = 10.0
# Most bytes of an answer.
MOST_ANSWER = 1024


def ask(folder: Path, wish: Wish, taken: Callable[[], None]) -> str:
    """Ask the process that holds the run in *folder*, and wait; return how the run has ended.

    Args:
        folder: Of a run.
        wish: What is wanted.
        taken: Called as soon as the run knows of it.

    Raises:
        ConfigError: no process holds the run, or it does not do this.
        EdgeError: it has ended without an answer, or does not listen.
    """
    with _dialled(folder) as link, link.makefile("rb") as lines:
        try:
            link.sendall(encode(wish))
            found = _read(lines.readline(MOST_ANSWER))
        except (ConnectionResetError, BrokenPipeError):
            found = {}
        except OSError as error:
            raise EdgeError(f"{folder}: its coordinator does not answer: {error}") from error
        if "refused" in found:
            raise ConfigError(f"{folder}: {found['refused']}")
        if "asked" not in found:
            raise EdgeError(f"{folder}: its coordinator has too many callers; try again")
        taken()
        link.settimeout(None)
        try:
            found = _read(lines.readline(MOST_ANSWER))
        except OSError:
            found = {}
    _await_end(folder)
    if "outcome" not in found:
        raise EdgeError(
            f"{folder}: its coordinator has ended without an answer; see `coordinator status "
            f"{folder}`"
        )
    return str(found["outcome"])


def _dialled(folder: Path) -> socket.socket:
    """Return a connection to the process that holds the run.

    Raises:
        ConfigError: there is none.
        EdgeError: it does not listen.
    """
    until_s = time.monotonic() + LISTENS_S
    while is_held(folder):
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(TAKEN_S)
        try:
            with socket_path(folder) as path:
                link.connect(path)
        except OSError as error:
            link.close()
            if time.monotonic() >= until_s:
                raise EdgeError(
                    f"{folder}: {holder(folder)} holds this run and does not listen "
                    f"({error.strerror}); Ctrl-C or SIGTERM pauses it"
                ) from error
            time.sleep(AGAIN_S)
        else:
            return link
    raise ConfigError(f"{folder}: this run does not go on now; see `coordinator status {folder}`")


def _read(line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:  # also where nothing has come
        return {}
    return found if isinstance(found, dict) else {}


def _await_end(folder: Path) -> None:
    """Wait until the run can be taken up by another process."""
    until_s = time.monotonic() + LETS_GO_S
    while is_held(folder) and time.monotonic() < until_s:
        time.sleep(AGAIN_S)
