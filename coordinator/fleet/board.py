"""One board behind ssh: what is asked of it, and what is brought there."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
import threading
from pathlib import Path
from typing import Any

from coordinator.fleet.config import BoardPlan
from coordinator.fleet.wanted import (
    CONFIG,
    DONE,
    KEY,
    command,
    data_name,
    unit_name,
)
from coordinator.remote.shell import SshShell, ask, put
from edge_sdk.errors import DeviceError

AGENT = Path(__file__).with_name("on_board.py")
LEAST_PYTHON = (3, 10)
INSTALL_S, DOCTOR_S, AGENT_S = 3600.0, 600.0, 240.0
# `$1` folder, `$2` environment in it, `$3` interpreter. What was begun and not finished goes first.
MAKE_VENV = 'cd "$1" && rm -rf "$2" && "$3" -m venv --system-site-packages "$2"'
# `$1` folder, `$2` interpreter of the environment, then words for pip.
PIP = 'cd "$1" && p="$2" && shift 2 && exec "$p" -m pip install -q --disable-pip-version-check "$@"'


class RemoteBoard:
    """A board, its device's folder and service."""

    def __init__(self, plan: BoardPlan, stop: threading.Event) -> None:
        self.plan, self._stop = plan, stop
        self._shell = SshShell(plan.ssh, plan.ssh_words, plan.python)
        self.found: dict[str, Any] = {}
        """What it has answered last to `look`."""

    def check_python(self) -> None:
        """Make sure that it can be reached, and that its Python is not too old.

        Raises:
            DeviceError: it cannot, or it is; the message has the cure.
        """
        say = "import sys; print(*sys.version_info[:2])"
        try:
            said = self._ask([self.plan.python, "-c", say])
        except DeviceError as error:
            by_hand = shlex.join(
                ["ssh", *self.plan.ssh_words, self.plan.ssh, self.plan.python, "-V"]
            )
            raise DeviceError(f"{error}; try it by hand: {by_hand}") from error
        try:
            major, minor = (int(word) for word in said.split())
        except ValueError as error:
            raise DeviceError(f"{self.plan.python} says {said.strip()!r}") from error
        if (major, minor) < LEAST_PYTHON:
            raise DeviceError(
                f"{self.plan.python} is Python {major}.{minor}, 3.10 is needed; install one and "
                "name it with `python`"
            )

    def _ask(self, words: list[str], **more: Any) -> str:
        return ask(self._shell, words, stop=self._stop, **more)

    def order(self, do: str, **more: Any) -> dict[str, Any]:
        """Have the board do one thing; return its answer.

        Raises:
            DeviceError: it cannot be reached, or could not do it.
        """
        told = {"do": do, "name": self.plan.name, "folder": self.plan.folder, **more}
        told["unit"] = unit_name(self.plan)
        source = AGENT.read_text(encoding="utf-8")
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(told).encode())
            file.seek(0)
            said = self._ask([self.plan.python, "-c", source], stdin=file, timeout_s=AGENT_S)
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError as error:
            raise DeviceError(f"its answer is none: {said.strip()[:100]!r}") from error
        if "error" in answer:
            raise DeviceError(str(answer["error"]))
        return answer

    def look(self, venv: str | None) -> dict[str, Any]:
        """Ask what lies there and what runs."""
        files = [CONFIG, KEY]
        files += [] if venv is None else [f"{venv}/{DONE}"]
        files += [] if self.plan.data is None else [data_name(self.plan)]
        self.found = self.order("look", files=files, service=self.plan.service)
        return self.found

    def claim(self) -> None:
        """Make the folder, and let it be this device's."""
        self.order("write", files={})

    def write(self, name: str, text: str) -> None:
        """Write a small file."""
        self.order("write", files={name: text})

    @property
    def folder(self) -> str:
        """The device's folder there."""
        return str(self.found["folder"])

    def python(self, venv: str | None) -> str:
        """Return the interpreter that has EdgeSplit."""
        return self.plan.installed or f"{self.folder}/{venv}/bin/python"

    def install(self, venv: str, package: str, wheel: Path | None, wheels: Path | None) -> None:
        """Make an environment and install EdgeSplit there."""
        words = [*self.plan.packages]
        if wheel is not None:
            put(self._shell, wheel, f"{self.folder}/{wheel.name}", stop=self._stop)
            package = f"./{wheel.name}"
        if wheels is not None:
            self._ask(["mkdir", "-p", f"{self.folder}/wheels"])
            for file in sorted(wheels.glob("*.whl")):
                put(self._shell, file, f"{self.folder}/wheels/{file.name}", stop=self._stop)
            words = ["--no-index", "--find-links", "wheels", *words]
        try:
            made = ["sh", "-c", MAKE_VENV, "sh", self.folder, venv, self.plan.python]
            self._ask(made, timeout_s=INSTALL_S)
        except DeviceError as error:
            cure = "Debian and Ubuntu need: sudo apt install python3-venv"
            raise DeviceError(f"no environment can be made: {error}; {cure}") from error
        for line in self.plan.first:
            self._pip(venv, shlex.split(line))
        extras = f"[{','.join(self.plan.extras)}]" if self.plan.extras else ""
        name, equals, version = package.partition("==")
        self._pip(venv, [f"{name}{extras}{equals}{version}", *words])
        self._ask(["touch", f"{self.folder}/{venv}/{DONE}"])

    def _pip(self, venv: str, words: list[str]) -> None:
        given = [self.folder, f"{venv}/bin/python", *words]
        self._ask(["sh", "-c", PIP, "sh", *given], timeout_s=INSTALL_S)

    def bring_data(self) -> None:
        """Copy the training file."""
        assert self.plan.data is not None
        put(self._shell, self.plan.data, f"{self.folder}/{data_name(self.plan)}", stop=self._stop)

    def make_key(self, venv: str | None) -> str:
        """Have the device make its key; return the public half."""
        words = [self.python(venv), "-m", "edge_sdk.cli", "keygen", KEY]
        self._ask(["sh", "-c", 'cd "$1" && shift && "$@"', "sh", self.folder, *words])
        return self.public_key()

    def enrol(self, venv: str | None, code: str) -> None:
        """Have the device make its key and register it by a code, which no command line shows."""
        words = [self.python(venv), "-m", "edge_sdk.cli", "enrol", "-"]
        words += ["--config", CONFIG, "--key", KEY]
        with tempfile.TemporaryFile() as file:
            file.write(code.encode())
            file.seek(0)
            self._ask(
                ["sh", "-c", 'cd "$1" && shift && "$@"', "sh", self.folder, *words], stdin=file
            )

    def public_key(self) -> str:
        """Return the public half of its key."""
        return self._ask(["cat", f"{self.folder}/{KEY}.pub"]).strip()

    def doctor(self, venv: str | None) -> list[dict[str, str]]:
        """Return what the doctor finds there."""
        words = command(self.python(venv), self.folder, "doctor", "--format", "json")
        said = self._ask(["sh", "-c", '"$@" 2>&1 || true', "sh", *words], timeout_s=DOCTOR_S)
        try:
            found: list[dict[str, str]] = json.loads(said[said.index("[\n") :])
        except ValueError as error:
            lines = said.strip().splitlines() or ["it says nothing"]
            raise DeviceError(f"the doctor does not work there: {lines[-1]}") from error
        return found

    def start(self, venv: str | None, text: str) -> dict[str, Any]:
        """Start the device, or start it again."""
        words = command(self.python(venv), self.folder, "run", "--supervise")
        return self.order("start", kind=self.found["kind"], text=text, command=words)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file here."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()
