"""A board of an experiment: what lies on it, how its program is started, how it is left clean.

    host = make_host(config, "kitchen", folder, "20260101-120000")
    host.prepare(...)       interpreter, keys, data
    host.start(...)         a supervised `edge-sdk run`
    host.clean()

Real and emulated boards differ in their shell and in their environment, and in nothing else.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.lab.experiment.config import BoardConfig, ExperimentConfig
from coordinator.remote.shell import LocalShell, Program, Shell, SshShell, ask, put
from edge_sdk.errors import ConfigError, DeviceError

INSTALL_S = 3600.0
KEY, DATA, CONFIG = "device.key", "data", "device.yaml"
RUN = "import sys; from edge_sdk.cli import main; sys.exit(main(sys.argv[1:]))"
POWER_MODE = "from profiler.sensors.board import power_mode; print(power_mode().value or '')"
# One thread, as a share of one core stands for the board.
EMULATED = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Makes the environment once for each wheel; `$1` work folder, `$2` mark, `$3` wheel, then packages.
INSTALL = """
cd "$1" && mark="venv/$2" && wheel="$3" && shift 3
[ -e "$mark" ] && exit 0
rm -rf venv && python3 -m venv --system-site-packages venv &&
venv/bin/python -m pip install --quiet --disable-pip-version-check "$wheel" "$@" && touch "$mark"
"""


@dataclass
class BoardHost:
    """One board: its shell, and its folders there."""

    name: str
    config: BoardConfig
    shell: Shell
    home: str
    """Folder of this experiment on the board."""
    workdir: str
    """Folder on the board that outlives the experiment: environment and parts of models."""
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""
    """Name or number under which it reaches this machine; empty until `prepare` finds it out."""
    enter: tuple[str, ...] = ()
    """Words of a command line that precede its program."""

    def prepare(self, key: Path, wheel: Callable[[], Path], stop: threading.Event) -> None:
        """Bring everything that does not change from run to run.

        Raises:
            ConfigError: the way back from the board is not known.
            DeviceError: the board cannot be reached, something failed there, or *stop* was set.
        """
        tell, bring = partial(ask, self.shell, stop=stop), partial(put, self.shell, stop=stop)
        self.address = self.address or self._address_of_ours()
        tell(["mkdir", "-p", self.workdir])
        if isinstance(self.shell, SshShell):
            root = tell(["sh", "-c", 'cd "$1" && pwd', "sh", self.workdir]).strip()
            self.home, self.workdir = self.home.replace(self.workdir, root, 1), root
            self._find_python(wheel, stop)
        tell(["sh", "-c", 'umask 077 && mkdir -p "$1"', "sh", self.home])
        bring(key, f"{self.home}/{KEY}")
        if self.config.data is not None:
            bring(Path(self.config.data), f"{self.home}/{self.data_name}")

    def _find_python(self, wheel: Callable[[], Path], stop: threading.Event) -> None:
        if self.config.python is not None:
            self.shell.python = self.config.python
        else:
            self._install(wheel(), stop)
        try:
            ask(self.shell, [self.shell.python, "-c", "import edge_sdk.cli"], stop=stop)
        except DeviceError as error:
            raise DeviceError(
                f"{self.shell.python} on this board cannot import edge_sdk: {error}"
            ) from error

    def _install(self, wheel: Path, stop: threading.Event) -> None:
        board = self.config
        wanted = f"{wheel.name}[{','.join(board.extras)}]" if board.extras else wheel.name
        packages = repr((wanted, board.packages)).encode()
        content = hashlib.sha256(wheel.read_bytes() + packages)
        mark = f".edgesplit-{content.hexdigest()[:16]}"
        put(self.shell, wheel, f"{self.workdir}/{wheel.name}", stop=stop)
        words = ["sh", "-c", INSTALL, "sh", self.workdir, mark, f"./{wanted}", *board.packages]
        ask(self.shell, words, timeout_s=INSTALL_S, stop=stop)
        self.shell.python = f"{self.workdir}/venv/bin/python"

    @property
    def data_name(self) -> str:
        """Name of its data file on the board; the ending says which format it has."""
        return DATA + "".join(Path(self.config.data or "").suffixes)

    def settings(
        self, config: ExperimentConfig, address: str, server_key: str, label: str
    ) -> dict[str, Any]:
        """Return what `edge-sdk run` reads in the run *label*."""
        data = {k: v for k, v in asdict(config.experiment.data).items() if v is not None}
        if self.config.data is not None:
            data["path"] = self.data_name
        settings: dict[str, Any] = {
            "coordinator": address,
            "server_key": server_key,
            "secret_key": KEY,
            "data": data,
            "cache": f"{self.workdir}/parts",
            "state": f"state/{label}",
        }
        if isinstance(self.shell, LocalShell):
            settings |= {"device": "cpu", "threads": 1}
        return settings

    def start(
        self,
        settings: dict[str, Any],
        folder: Path,
        groups: Sequence[Path],
        on_line: Callable[[str], None],
    ) -> Program:
        """Start the board's program.

        Args:
            settings: As `settings` returned them.
            folder: Folder of this machine for a copy of the settings.
            groups: Control groups to enter.
            on_line: Gets each line that the program writes.
        """
        copy = folder / f"{self.name}.yaml"
        copy.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        put(self.shell, copy, f"{self.home}/{CONFIG}")
        words = [self.shell.python, "-c", RUN, "run", "--config", CONFIG, *self.config.settings]
        return Program(
            self.shell,
            [*self.enter, *words],
            folder=self.home,
            environment={"PYTHONUNBUFFERED": "1", **self.environment},
            groups=groups,
            on_line=on_line,
        )

    def clean(self) -> None:
        """Remove the key, the data and everything else of this experiment."""
        ask(self.shell, ["rm", "-rf", self.home])

    def enter_power_mode(self, mode: str | None) -> str | None:
        """Bring an ssh board into a power mode, if one is named; return the one that it is in.

        Raises:
            DeviceError: it cannot be brought there.
        """
        if not isinstance(self.shell, SshShell):
            return None
        if mode is not None:
            try:
                ask(self.shell, ["sh", "-c", self.config.power_commands[mode]])
            except DeviceError as error:
                raise DeviceError(f"board {self.name}: power mode {mode}: {error}") from error
        return ask(self.shell, [self.shell.python, "-c", POWER_MODE]).strip() or None

    def _address_of_ours(self) -> str:
        """Return the address under which the board reaches this machine.

        It is looked up once: later the board may be out of reach for a while, and its name unknown.
        """
        if not isinstance(self.shell, SshShell):
            return "127.0.0.1"
        words = ["ssh", "-G", *self.shell.options, self.shell.host]
        lines = ask(LocalShell(), words).splitlines()
        given = {key: value for key, _, value in (line.partition(" ") for line in lines)}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((given["hostname"], int(given["port"])))  # sends nothing
            except OSError as error:
                raise ConfigError(
                    f"boards: {self.name}: no way to {given['hostname']} ({error.strerror}); set "
                    "experiment.address to the name under which boards reach this machine"
                ) from error
            return str(probe.getsockname()[0])


def make_host(config: ExperimentConfig, name: str, workspace: Path, label: str) -> BoardHost:
    """Return the host of one board; nothing is done there yet."""
    board, address = config.boards[name], config.experiment.address or ""
    if board.ssh is None:
        workdir = str(workspace / "boards" / name)
        home = f"{workdir}/{label}"
        return BoardHost(name, board, LocalShell(), home, workdir, dict(EMULATED), address)
    options = [*board.ssh_options]
    options += ["-p", str(board.port)] if board.port else []
    options += ["-i", str(board.identity)] if board.identity else []
    shell = SshShell(board.ssh, tuple(options))
    home = f"{board.workdir}/{label}-{name}"
    return BoardHost(name, board, shell, home, board.workdir, address=address)
