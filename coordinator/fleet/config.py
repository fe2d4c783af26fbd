"""What `coordinator deploy boards.yaml` reads: boards, and what lies on each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coordinator.gateway.keys.allow_list import is_device_name
from edge_sdk.transport.addresses import check_dialled

Service = Literal["auto", "user", "system", "process", "none"]
# What stands in a unit and in a shell's words; a home folder with a space in it is refused there.
_FOLDER = re.compile(r"[A-Za-z0-9_./~+-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedBoard:
    """One board behind ssh; what is left out is taken from `for_all`."""

    ssh: str = ""
    """`user@host`, or a name of ssh's configuration; a key must let us in without a question."""
    port: int | None = None
    """Port of its ssh server."""
    identity: Path | None = None
    """File of the secret key for its ssh server."""
    ssh_options: tuple[str, ...] | None = None
    """Further words of the command line of ssh."""
    folder: str | None = None
    """Folder on the board, relative to its home folder, for everything of this device; None:
    edgesplit."""
    python: str | None = None
    """Interpreter on the board, 3.10 or later, that makes the environment; None: python3."""
    installed: str | None = None
    """Interpreter on the board in whose environment EdgeSplit is installed; then none is made."""
    extras: tuple[str, ...] | None = None
    """Extras of EdgeSplit that are installed; None: onnx. Empty where the system's packages, which
    the environment sees, have torch or onnxruntime already."""
    first: tuple[str, ...] | None = None
    """Lines for `pip install` before EdgeSplit is, such as a JetPack's own torch."""
    packages: tuple[str, ...] | None = None
    """Further words for the `pip install` of EdgeSplit: packages and options."""
    data: Path | None = None
    """Its training file on this machine, which is copied to the board; None: `settings` name a file
    that is there."""
    settings: tuple[str, ...] | None = None
    """`key=value` of the device's config; those of the board win over those for all."""
    service: Service | None = None
    """What starts it: a systemd unit of the `user`, or of the `system` (as root, or by sudo without
    a password), a supervised `process` that does not outlive a reboot, or nothing (`none`). None:
    auto, which is user where systemd runs for users, system where that alone works, else
    process."""

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        if not _FOLDER.fullmatch(self.folder):
            allowed = "letters, digits and ._/~+- alone"
            raise ValueError(f"folder must have {allowed}, got {self.folder!r}")
        if self.folder.strip("./~") == "":
            raise ValueError("folder must be one of its own: all of it is removed with the device")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployConfig:
    """Boards that take part in the runs of one coordinator, which is on this machine."""

    config: Path | None = None
    """The run's config file, for `secret_key`, `allow_list` and `listen`."""
    secret_key: Path = Path("coordinator.key")
    """The coordinator's secret key, where `config` is not given."""
    allow_list: Path = Path("devices.yaml")
    """Where devices are registered, where `config` is not given."""
    address: str | None = None
    """tcp://HOST:PORT that boards dial; None: the host by which this machine reaches the board, and
    the port of `listen`, or 7070."""
    wheel: Path | None = None
    """Wheel of EdgeSplit; None: it is built from this checkout."""
    from_index: str | None = None
    """What pip installs from its index in place of a wheel, for instance edgesplit==0.1.0."""
    wheels: Path | None = None
    """Folder with all wheels that boards need, for boards that reach no index; copied there."""
    parallel: int = 8
    """Boards that are worked on at the same time."""
    for_all: DeployedBoard = field(default_factory=DeployedBoard)
    """What is common to the boards."""
    boards: dict[str, DeployedBoard]
    """By the name under which each is registered."""

    def __post_init__(self) -> None:
        if self.address is not None:
            check_dialled("address", self.address)
        if not self.boards:
            raise ValueError("boards is empty; name at least one")
        for name, board in self.boards.items():
            if not is_device_name(name):
                raise ValueError(f"boards.{name}: letters, digits, '.', '_', '-', at most 64")
            if not board.ssh:
                raise ValueError(f"boards.{name}.ssh is missing: user@host")
        if not 1 <= self.parallel <= 256:
            raise ValueError(f"parallel must be 1..256, got {self.parallel}")
        if self.wheel is not None and self.from_index is not None:
            raise ValueError("give wheel or from_index, one of them")
        if self.for_all.ssh or self.for_all.data is not None:
            raise ValueError("for_all: ssh and data belong to single boards")


@dataclass(frozen=True, kw_only=True)
class BoardPlan:
    """One board with nothing left open."""

    name: str
    ssh: str
    ssh_words: tuple[str, ...]
    folder: str
    python: str
    installed: str | None
    extras: tuple[str, ...]
    first: tuple[str, ...]
    packages: tuple[str, ...]
    data: Path | None
    settings: tuple[str, ...]
    service: Service


def plan_of(config: DeployConfig, name: str) -> BoardPlan:
    """Return what *name* is to be, its own words before those for all before the defaults."""
    own, shared = config.boards[name], config.for_all
    port, identity = own.port or shared.port, own.identity or shared.identity
    words = [*(own.ssh_options or shared.ssh_options or ())]
    words += ["-p", str(port)] if port else []
    words += ["-i", str(identity)] if identity else []

    def first_of(mine: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> tuple[str, ...]:
        return mine if mine is not None else ours if ours is not None else ()

    extras = first_of(own.extras, shared.extras)
    if own.extras is None and shared.extras is None:
        extras = ("onnx",)
    return BoardPlan(
        name=name,
        ssh=own.ssh,
        ssh_words=tuple(words),
        folder=own.folder or shared.folder or "edgesplit",
        python=own.python or shared.python or "python3",
        installed=own.installed or shared.installed,
        extras=extras,
        first=first_of(own.first, shared.first),
        packages=first_of(own.packages, shared.packages),
        data=own.data,
        settings=(*(shared.settings or ()), *(own.settings or ())),
        service=own.service or shared.service or "auto",
    )
