"""What is done on a board to systemd, tried with a program in its place: none answers here.

What a supervised process does is tried for real, over ssh, in tests/e2e/test_deploy.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coordinator.fleet import on_board
from coordinator.fleet.on_board import BoardTrouble

# Notes its words; `is-active` answers with what was last asked for.
SYSTEMCTL = """#!/bin/sh
[ "$1" = --user ] && shift
echo "$*" >> "$PLACE/said"
case "$1" in
    restart) echo active > "$PLACE/state" ;;
    stop) echo inactive > "$PLACE/state" ;;
    is-active) cat "$PLACE/state" 2>/dev/null || echo inactive ;;
    enable) [ ! -e "$PLACE/refuses" ] || { echo "Refusing to operate" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a systemctl that does what it is told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("loginctl", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(on_board, "STARTED_S", 0.0)
    return tmp_path


def order(**more: Any) -> dict[str, Any]:
    """Return an order about a device called `kitchen`."""
    about = {"name": "kitchen", "folder": "edgesplit", "unit": "edgesplit-kitchen.service"}
    return {**about, "kind": "user", "service": "auto", "files": {}, **more}


def test_a_unit_of_the_user_is_placed_started_stopped_and_removed(place: Path) -> None:
    """Where systemd answers for users it is chosen; in the end nothing is left."""
    unit = place / ".config/systemd/user/edgesplit-kitchen.service"
    on_board.write(order(files={"device.yaml": "a: 1"}))

    assert on_board.look(order(files=["device.yaml"]))["kind"] == "user"
    assert on_board.start(order(text="[Unit]\n")) == {"state": "active", "lingers": True}
    assert unit.read_text() == "[Unit]\n"
    found = on_board.look(order(files=[]))
    assert (found["state"], found["unit"]) == ("active", on_board.digest(str(unit)))
    assert on_board.stop(order()) == {"before": "active"}
    assert on_board.remove(order()) == {"was_there": True}

    assert not unit.exists()
    assert not (place / "edgesplit").exists()
    said = (place / "said").read_text().splitlines()
    changes = [line.split()[0] for line in said if not line.startswith(("is-active", "show-env"))]
    assert changes == ["daemon-reload", "enable", "restart", "stop", "disable", "daemon-reload"]


def test_what_systemd_refuses_is_told(place: Path) -> None:
    """With its own last line."""
    (place / "refuses").touch()
    on_board.write(order())

    with pytest.raises(BoardTrouble, match="enable edgesplit-kitchen.service` failed: Refusing"):
        on_board.start(order(text=""))


def test_without_systemd_a_process_is_chosen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is as good as none."""
    (place / "bin" / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(on_board.os.path, "isdir", lambda path: False)

    assert on_board.choose("auto") == "process"
    assert on_board.choose("system") == "system"


def test_files_are_private_and_folders_of_others_left_alone(place: Path) -> None:
    """Nothing is written into a folder that is no device's, nor removed with it."""
    on_board.write(order(files={"device.yaml": "a: 1"}))
    assert (place / "edgesplit" / "device.yaml").stat().st_mode & 0o777 == 0o600
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter").touch()

    for do in (on_board.write, on_board.remove):
        with pytest.raises(BoardTrouble, match="is no device's"):
            do(order(folder="thesis"))
    with pytest.raises(BoardTrouble, match="is that of kitchen"):
        on_board.remove(order(name="garage"))

    assert (place / "thesis" / "chapter").exists()


def test_a_process_that_is_not_ours_is_not_taken_for_it(place: Path) -> None:
    """A number that another program has by now says nothing."""
    on_board.write(order())
    (place / "edgesplit" / on_board.PID).write_text(str(os.getpid()))

    assert on_board.process_of(str(place / "edgesplit")) is None
    assert on_board.stop(order(kind="process")) == {"before": "inactive"}


def test_older_environments_are_tidied_away(place: Path) -> None:
    """The one that is used stays."""
    for name in ("venv-1", "venv-2", "parts"):
        (place / "edgesplit" / name).mkdir(parents=True)

    assert on_board.tidy(order(keep="venv-2")) == {"gone": ["venv-1"]}
    assert sorted(p.name for p in (place / "edgesplit").iterdir()) == ["parts", "venv-2"]
