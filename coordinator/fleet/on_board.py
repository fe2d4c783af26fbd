"""Runs on a board by the Python that is there, and does one thing; imports nothing of ours.

    python -c SOURCE    then on stdin a JSON object {"do": ..., ...}
    on stdout           a JSON object: what was found, or {"error": "..."}

Everything of a device lies in one folder, which carries the device's name in a file: whatever lacks
that file is not removed.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

OWNER = ".edgesplit-board"
PID, LOG = "run.pid", "run.log"
# Seconds for a device to finish its step and say goodbye, and for one that just came up to fail.
STOP_S, STARTED_S = 60.0, 1.5
SYSTEM_UNITS = "/etc/systemd/system"
Order = dict[str, Any]


def main() -> None:
    """Read an order, and answer it."""
    order = json.loads(sys.stdin.buffer.read())
    try:
        answer = DO[order["do"]](order)
    except (OSError, subprocess.SubprocessError, BoardTrouble) as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


class BoardTrouble(Exception):
    """Something that a person must know."""


def home(order: Order) -> str:
    """Return the folder of the device."""
    return os.path.abspath(
        os.path.join(os.path.expanduser("~"), os.path.expanduser(order["folder"]))
    )


# ---- looking ----


def look(order: Order) -> Order:
    """Return what lies there and what runs."""
    folder = home(order)
    kind = choose(order["service"])
    return {
        "folder": folder,
        "machine": platform.machine(),
        "owner": text_of(os.path.join(folder, OWNER)),
        "files": {name: digest(os.path.join(folder, name)) for name in order["files"]},
        "public": text_of(os.path.join(folder, "device.key.pub")),
        "kind": kind,
        "unit": digest(unit_path(kind, order["unit"])) if kind in ("user", "system") else None,
        "state": state(kind, folder, order["unit"]),
        "user": getpass.getuser(),
        "from": os.environ.get("SSH_CONNECTION", "").partition(" ")[0],
        "last": last_line(kind, folder, order["unit"]),
    }


def text_of(path: str) -> str | None:
    """Return the text of a small file, None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(4096).strip()
    except OSError:
        return None


def digest(path: str) -> str | None:
    """Return the SHA-256 of a file, None where there is none."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                found.update(block)
    except OSError:
        return None
    return found.hexdigest()


# ---- services ----


def choose(wanted: str) -> str:
    """Return what starts a device here."""
    if wanted != "auto":
        return wanted
    if succeeds(["systemctl", "--user", "show-environment"]):
        return "user"
    if os.path.isdir("/run/systemd/system") and (os.getuid() == 0 or succeeds(sudo(["true"]))):
        return "system"
    return "process"


def sudo(words: list[str]) -> list[str]:
    """Return *words* as root, without a question."""
    return words if os.getuid() == 0 else ["sudo", "-n", *words]


def succeeds(words: list[str]) -> bool:
    """Return whether a command ends with 0."""
    try:
        return run(words).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def run(words: list[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        words, input=given or "", capture_output=True, text=True, timeout=120, check=False
    )


def must(words: list[str], given: str | None = None) -> str:
    """Run a command that must end with 0; return what it says."""
    done = run(words, given)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BoardTrouble(f"`{' '.join(words)}` failed: {said[-1] if said else done.returncode}")
    return done.stdout


def systemctl(kind: str, *words: str) -> list[str]:
    """Return a call of systemctl that may change something."""
    return ["systemctl", "--user", *words] if kind == "user" else sudo(["systemctl", *words])


def unit_path(kind: str, name: str) -> str:
    """Return where a unit lies."""
    if kind == "system":
        return os.path.join(SYSTEM_UNITS, name)
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "systemd", "user", name)


def state(kind: str, folder: str, unit: str) -> str:
    """Return `active`, `inactive` or `failed`."""
    if kind in ("user", "system"):
        words = ["systemctl", *(["--user"] if kind == "user" else []), "is-active", unit]
        try:
            said = run(words).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "inactive"
        return "active" if said in ("active", "activating", "reloading") else said or "inactive"
    return "inactive" if process_of(folder) is None else "active"


def process_of(folder: str) -> int | None:
    """Return the process that `start` left in *folder*, None where it has ended."""
    try:
        pid = int(text_of(os.path.join(folder, PID)) or "0")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        with open(f"/proc/{pid}/stat", "rb") as file:
            is_dead = file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, ValueError, IndexError):
        return None
    config = os.path.join(folder, "device.yaml").encode()
    return pid if config in words and not is_dead else None


def last_line(kind: str, folder: str, unit: str) -> str:
    """Return what the device said last."""
    if kind in ("user", "system"):
        words = ["journalctl", *(["--user"] if kind == "user" else []), "-u", unit]
        try:
            said = run([*words, "-n", "1", "-o", "cat"]).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
    else:
        try:
            with open(os.path.join(folder, LOG), "rb") as file:
                file.seek(max(0, os.path.getsize(file.name) - 2000))
                said = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
    lines = said.strip().splitlines()
    return lines[-1] if lines else ""


# ---- changing ----


def write(order: Order) -> Order:
    """Write small files, each whole or not at all, for their owner alone."""
    folder = home(order)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    owner = text_of(os.path.join(folder, OWNER))
    if owner is None and [name for name in os.listdir(folder) if not name.startswith(".")]:
        raise BoardTrouble(f"{folder} is there and is no device's; name another folder")
    for name, text in {OWNER: order["name"] + "\n", **order["files"]}.items():
        path = os.path.join(folder, name)
        with open(
            os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w"
        ) as file:
            file.write(text)
        os.replace(path + ".new", path)
    return {"folder": folder}


def start(order: Order) -> Order:
    """Start the device, or start it again; say if it ends at once."""
    kind, folder, unit = order["kind"], home(order), order["unit"]
    if kind in ("user", "system"):
        place_unit(kind, unit, order["text"])
        must(systemctl(kind, "enable", unit))
        must(systemctl(kind, "restart", unit))
        lingers = kind == "system" or succeeds(["loginctl", "enable-linger", getpass.getuser()])
        time.sleep(STARTED_S)
        return {"state": state(kind, folder, unit), "lingers": lingers}
    stop(order)
    log = os.open(os.path.join(folder, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    started = subprocess.Popen(
        order["command"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    os.close(log)
    with open(os.path.join(folder, PID), "w") as file:
        file.write(str(started.pid))
    try:
        code = started.wait(STARTED_S)
    except subprocess.TimeoutExpired:
        return {"state": "active", "lingers": True}
    if code:
        raise BoardTrouble(f"it ended at once with {code}: {last_line(kind, folder, unit)}")
    return {"state": "inactive", "lingers": True}


def place_unit(kind: str, unit: str, text: str) -> None:
    """Put a unit where systemd finds it."""
    path = unit_path(kind, unit)
    if kind == "system":
        must(sudo(["tee", path]), text)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
    must(systemctl(kind, "daemon-reload"))


def stop(order: Order) -> Order:
    """Let the device finish its step and end; what it was is said."""
    kind, folder, unit = order["kind"], home(order), order["unit"]
    before = state(kind, folder, unit)
    if kind in ("user", "system"):
        if before != "inactive":
            must(systemctl(kind, "stop", unit))
        return {"before": before}
    pid = process_of(folder)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while process_of(folder) is not None:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, PID))
    return {"before": before}


def remove(order: Order) -> Order:
    """Stop the device, and remove its unit and its folder."""
    kind, folder, unit = order["kind"], home(order), order["unit"]
    owner = text_of(os.path.join(folder, OWNER))
    if owner is not None and owner != order["name"]:
        raise BoardTrouble(f"{folder} is that of {owner}")
    if owner is None and os.path.isdir(folder) and os.listdir(folder):
        raise BoardTrouble(f"{folder} is there and is no device's; it is left alone")
    stop(order)
    path = unit_path(kind, unit)
    if kind in ("user", "system") and os.path.exists(path):
        must(systemctl(kind, "disable", unit))
        must(sudo(["rm", "-f", path]) if kind == "system" else ["rm", "-f", path])
        must(systemctl(kind, "daemon-reload"))
    was_there = os.path.isdir(folder)
    if was_there:
        shutil.rmtree(folder)
    return {"was_there": was_there}


def tidy(order: Order) -> Order:
    """Remove environments other than the one that is used."""
    folder, gone = home(order), []
    for name in os.listdir(folder):
        if name.startswith("venv-") and name != order["keep"]:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            gone.append(name)
    return {"gone": gone}


DO = {"look": look, "write": write, "start": start, "stop": stop, "remove": remove, "tidy": tidy}

if __name__ == "__main__":
    main()
