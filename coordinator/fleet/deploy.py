"""Bring devices to all boards of a file, several at a time; whoever fails holds nobody up.

    failures = Deployment(config, say, stop).run("deploy", names)

Each board is looked at first and gets what is missing: where nothing is, nothing is done. Keys are
made on the boards. Where a coordinator listens they register by a code, which also proves that the
board reaches it; else we register them, since ssh has told us whose they are.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.config.presets import load_serve_config
from coordinator.fleet.board import RemoteBoard, digest
from coordinator.fleet.config import BoardPlan, DeployConfig, plan_of
from coordinator.fleet.wanted import (
    ENVIRONMENT,
    MAKE_KEY,
    PUT_CONFIG,
    PUT_DATA,
    REGISTER,
    START,
    Wanted,
    data_name,
    device_config,
    first_failure,
    in_words,
    missing,
    unit_text,
    venv_name,
)
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.remote.wheel import build_wheel
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError, DeviceError, EdgeError, one_line
from edge_sdk.transport.addresses import DEFAULT_PORT, parse_address
from edge_sdk.transport.enrol_code import write_code
from edge_sdk.transport.keys import load_key_pair

NO_WHEEL = "name a `wheel`, or `from_index: edgesplit==VERSION`"
LINK_CHECKS = ("name", "reach", "mtu", "handshake", "session", "link")
"""Of the doctor; they fail where no coordinator runs yet, which is no fault of a board."""
CODE_LASTS_S = 900.0
DIAL_S = 2.0
SERVICES = {"user": "user service", "system": "system service", "process": "process"}


class _Package(NamedTuple):
    """What is installed."""

    name: str
    content: bytes
    wheel: Path | None


class Deployment:
    """Boards of one file, and the coordinator on this machine that they belong to.

    Args:
        config: What the file says.
        say: Gets a line a board, as soon as it is known.
        note: Gets what takes a while, when it begins.
        stop: Set by whoever wants to end it; boards are left as they are then.
    """

    def __init__(
        self,
        config: DeployConfig,
        say: Callable[[str], None],
        stop: threading.Event,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._config, self._say, self._stop, self._note = config, say, stop, note
        self._secret_key, self._allow_list, self._port = _coordinator_of(config)
        self._lock = threading.Lock()
        self._package: _Package | None = None
        self._workspace, self._public = Path(), ""

    def run(self, do: str, names: Sequence[str] = ()) -> int:
        """Do one thing on all boards, or on those of *names*; return how many have failed.

        Args:
            do: `deploy`, `check`, `status`, `stop` or `remove`.
            names: Boards of the file; empty: all.

        Raises:
            ConfigError: a name is not in the file, or the coordinator's key cannot be read.
        """
        if unknown := sorted(set(names) - self._config.boards.keys()):
            known = ", ".join(self._config.boards)
            raise ConfigError(f"no board is called {unknown[0]!r} in this file; it has {known}")
        plans = [plan_of(self._config, name) for name in names or self._config.boards]
        act = {
            "deploy": self._deploy,
            "check": self._check,
            "status": self._status,
            "stop": self._end,
            "remove": self._remove,
        }[do]
        if do in ("deploy", "check"):
            self._public = load_key_pair(self._secret_key).public
            for plan in plans:
                self._refuse_wrong(plan)
        failed = 0
        with (
            tempfile.TemporaryDirectory(prefix="edgesplit-") as folder,
            ThreadPoolExecutor(min(len(plans), self._config.parallel)) as pool,
        ):
            self._workspace = Path(folder)
            working = {pool.submit(act, RemoteBoard(plan, self._stop)): plan.name for plan in plans}
            for done in as_completed(working):
                try:
                    line = done.result()
                except (EdgeError, OSError) as error:
                    failed += 1
                    line = one_line(error)
                self._say(f"{working[done]}: {line}")
        return failed

    def _refuse_wrong(self, plan: BoardPlan) -> None:
        """Look at what can be seen from here, before any board is touched."""
        if plan.data is not None and not plan.data.is_file():
            raise ConfigError(f"boards.{plan.name}.data: {plan.data} is no file")
        text = device_config(plan, "", self._config.address or "tcp://localhost:7070", "key")
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            try:
                load_config(ClientConfig, file.name, env={})
            except ConfigError as error:
                said = str(error).partition(f"{file.name}")[2].partition(": ")[2] or str(error)
                raise ConfigError(f"boards.{plan.name}.settings: {said}") from error

    # ---- what is done on one board ----

    def _deploy(self, board: RemoteBoard) -> str:
        wanted, steps = self._looked(board)
        if not steps:
            return f"unchanged, running ({SERVICES.get(board.found['kind'], 'not ours to start')})"
        venv, done = wanted.venv, []
        board.claim()
        if ENVIRONMENT in steps:
            assert venv is not None
            package = self._packaged()
            self._note(f"{board.plan.name}: installing {package.name}, which may take minutes")
            board.install(venv, package.name, package.wheel, self._config.wheels)
            done.append("installed")
        if MAKE_KEY in steps or REGISTER in steps:
            done.append(self._give_key(board, venv, is_new=MAKE_KEY in steps))
        if PUT_DATA in steps:
            self._note(f"{board.plan.name}: bringing {board.plan.data}")
            board.bring_data()
            done.append("data brought")
        if PUT_CONFIG in steps or MAKE_KEY in steps:
            board.write("device.yaml", wanted.config)
            done.append("config written")
        if set(steps) - {START, REGISTER}:
            done.append(self._examined(board, venv))
        if START in steps:
            done.append(self._started(board, wanted))
            if venv is not None:
                board.order("tidy", keep=venv)
        return ", ".join(done)

    def _looked(self, board: RemoteBoard) -> tuple[Wanted, list[str]]:
        """Return what is to be there, and what is missing."""
        board.check_python()
        plan = board.plan
        venv = None
        if plan.installed is None:
            venv = venv_name(plan, self._packaged().content)
        found = board.look(venv)
        owner = found["owner"]
        if owner is not None and owner != plan.name:
            raise ConfigError(
                f"{found['folder']} is that of {owner}; give each a `folder` of its own"
            )
        wanted = Wanted(
            venv=venv,
            config=device_config(plan, found["folder"], self._address(found), self._public),
            data_name=None if plan.data is None else data_name(plan),
            data_sha256=None if plan.data is None else digest(plan.data),
            unit=unit_text(plan, found, board.python(venv)),
            registered=AllowList(self._allow_list).devices().get(plan.name),
        )
        return wanted, missing(wanted, found)

    def _packaged(self) -> _Package:
        """Return what is installed, built once for all boards."""
        with self._lock:
            if self._package is None:
                name = self._config.from_index
                if name is not None:
                    self._package = _Package(name, name.encode(), None)
                else:
                    wheel = self._config.wheel
                    if wheel is None:
                        self._note("building a wheel of this checkout")
                        wheel = build_wheel(self._workspace / "wheel", NO_WHEEL)
                    self._package = _Package(wheel.name, wheel.read_bytes(), wheel)
            return self._package

    def _address(self, found: dict[str, Any]) -> str:
        """Return where the board dials: as told, else this machine as the board sees it."""
        if self._config.address is not None:
            return self._config.address
        host = found["from"]
        if not host:
            raise ConfigError("address is missing: how boards reach this machine is not known")
        return f"tcp://[{host}]:{self._port}" if ":" in host else f"tcp://{host}:{self._port}"

    def _give_key(self, board: RemoteBoard, venv: str | None, *, is_new: bool) -> str:
        """Let the board have a key that is registered."""
        name, address = board.plan.name, self._address(board.found)
        if is_new and _listens(address):
            code = EnrolmentBook(self._allow_list).make_code(
                name, address, self._public, lasts_s=CODE_LASTS_S, replaces=True
            )
            board.enrol(venv, write_code(code))
            return "key enrolled"
        key = board.make_key(venv) if is_new else board.public_key()
        AllowList(self._allow_list).register(name, key)
        return "key made and registered" if is_new else "key registered again"

    def _examined(self, board: RemoteBoard, venv: str | None) -> str:
        """Ask the doctor there; what keeps a run from starting is an error."""
        self._note(f"{board.plan.name}: asking the doctor")
        findings = board.doctor(venv)
        ignored = () if _listens(self._address(board.found)) else LINK_CHECKS
        if failure := first_failure(findings, ignored):
            raise DeviceError(failure)
        warned = [f["check"] for f in findings if f["status"] == "warning"]
        return f"doctor warns of {', '.join(warned)}" if warned else "doctor content"

    def _started(self, board: RemoteBoard, wanted: Wanted) -> str:
        answer = board.start(wanted.venv, wanted.unit)
        if answer["state"] not in ("active", "inactive"):
            last = board.look(wanted.venv)["last"]
            raise DeviceError(f"it does not stay up ({answer['state']}): {last}")
        text = f"started ({SERVICES[board.found['kind']]})"
        if not answer["lingers"]:
            text += "; it ends when its user logs out: sudo loginctl enable-linger there"
        return text

    def _check(self, board: RemoteBoard) -> str:
        wanted, steps = self._looked(board)
        text = in_words(steps)
        if ENVIRONMENT not in steps and PUT_CONFIG not in steps and MAKE_KEY not in steps:
            text += f"; {self._examined(board, wanted.venv)}"
        return text

    def _status(self, board: RemoteBoard) -> str:
        board.check_python()
        found = board.look(None)
        if found["owner"] is None:
            return "not deployed"
        key = AllowList(self._allow_list).devices().get(board.plan.name)
        known = "" if key is not None and key == found["public"] else ", key not registered"
        last = f": {one_line(found['last'])}" if found["last"] else ""
        return f"{found['state']} ({SERVICES.get(found['kind'], found['kind'])}){known}{last}"

    def _end(self, board: RemoteBoard) -> str:
        board.check_python()
        found = board.look(None)
        if found["kind"] == "none" or found["owner"] is None:
            return "not ours to stop"
        before = board.order("stop", kind=found["kind"])["before"]
        return "stopped" if before == "active" else f"was not running ({before})"

    def _remove(self, board: RemoteBoard) -> str:
        board.check_python()
        found = board.look(None)
        was_there = board.order("remove", kind=found["kind"])["was_there"]
        allowed = AllowList(self._allow_list)
        if found["public"] is not None and allowed.name_of(found["public"]) == board.plan.name:
            allowed.unregister(board.plan.name)
            return "removed, key unregistered"
        return "removed" if was_there else "nothing there"


def _coordinator_of(config: DeployConfig) -> tuple[Path, Path, int]:
    """Return secret key, allow-list and port of the coordinator.

    Raises:
        ConfigError: its config cannot be read, or its port is any.
    """
    if config.config is None:
        return config.secret_key, config.allow_list, DEFAULT_PORT
    run = load_serve_config(config.config)
    port = run.listen.rpartition(":")[2]
    if config.address is None and not port.isdigit():
        raise ConfigError(f"listen is {run.listen!r}, any port; set address: tcp://HOST:PORT")
    return run.secret_key, run.allow_list, int(port) if port.isdigit() else DEFAULT_PORT


def _listens(address: str) -> bool:
    try:
        socket.create_connection(parse_address(address) or ("", 0), DIAL_S).close()
    except (OSError, UnicodeError):
        return False
    return True
