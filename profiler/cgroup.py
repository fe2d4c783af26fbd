"""Control groups: the limits of a container or a systemd unit, versions 1 and 2.

psutil and /proc/meminfo speak of the host, whatever limit stands around this process. Only finds
their folders; what stands there is read in `memory.py` and `cores.py`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of this process's groups for *controller*, innermost first.

    A limit may stand in any of them. In a container the path in /proc/self/cgroup can be that of
    the host, which is not mounted there; the folders that do not exist are left out, and the top
    one, which then is the container's own, remains.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            folders += _upwards(root / "sys/fs/cgroup" / controller, path)
        elif not controllers:
            folders += _upwards(root / "sys/fs/cgroup", path)
    return [folder for folder in folders if folder.is_dir()]


def _upwards(mount: Path, path: str) -> list[Path]:
    # A group outside our namespace is written with leading "..".
    parts = [part for part in PurePosixPath(path.lstrip("/")).parts if part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
