"""What `coordinator experiment run FILE` reads: a run, its boards, and what happens to them.

Pure; `board_host.py` finds out whether a board answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from coordinator.config.presets import NAMES
from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import is_device_name
from coordinator.lab.comparison.config import MethodConfig
from coordinator.lab.experiment.relay import LinkShape
from coordinator.lab.simulation.boards import Board, Catalogue, Connection, Scale, free_bytes, known
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError

OF_ALL_METHODS = ("boards", "faults", "experiment")
BYTES_PER_MBIT = 1e6 / 8
# Hosts of a listener that accepts connections to any address of this machine.
EVERYWHERE = ("*", "0.0.0.0", "[::]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardConfig:
    """One board: a real one behind ssh, or one that this machine emulates."""

    ssh: str | None = None
    """`user@host`, or a name of ssh's configuration; a key must let us in."""
    port: int | None = None
    """Port of its ssh server."""
    identity: Path | None = None
    """File of the secret key for its ssh server."""
    ssh_options: tuple[str, ...] = ()
    """Further words of the command line of ssh."""
    workdir: str = "edgesplit"
    """Folder on an ssh board, relative to its home folder; the environment and downloaded parts of
    models stay there, everything else is removed."""
    python: str | None = None
    """Interpreter on an ssh board in whose environment EdgeSplit is installed; None: an environment
    is made in `workdir`, and a wheel of this version installed there."""
    extras: tuple[str, ...] = ("onnx",)
    """Extras of EdgeSplit that are installed with the wheel; empty where the system's packages,
    which the environment sees, have torch or onnxruntime already."""
    packages: tuple[str, ...] = ()
    """Further words for `pip install`: packages and options."""
    emulated: str | None = None
    """Name in coordinator/lab/simulation/boards.yaml or in `experiment.boards`."""
    memory_bytes: float | None = None
    """Memory of an emulated board, instead of what the board has."""
    cpu_quota: float | None = None
    """Cores of this machine for an emulated board, instead of a share in proportion to its peak."""
    watts: float | None = None
    """Power of an emulated board while it computes, in watts; None: that of its data sheet."""
    power_commands: dict[str, str] = field(default_factory=dict)
    """What brings an ssh board into each of `experiment.power_modes`, as its shell reads it, such
    as `sudo -n nvpmodel -m 0`."""
    link: str | None = None
    """Name in coordinator/lab/simulation/links.yaml or in `experiment.links`; None: no limit. An
    ssh board with a link dials a relay on this machine, in addition to its real link."""
    jitter_ms: float = 0.0
    """Largest delay each way in addition to that of `link`, in milliseconds."""
    data: str | None = None
    """Its training file on this machine, which is copied to the board; None: `settings` name a file
    on the board."""
    settings: tuple[str, ...] = ()
    """`key=value` of `edge-sdk run`."""

    def __post_init__(self) -> None:
        if (self.ssh is None) == (self.emulated is None):
            raise ValueError("give ssh or emulated, one of them")
        foreign = _OVER_SSH if self.ssh is None else _EMULATION
        plain = {each.name: each.default for each in fields(self)} | {"power_commands": {}}
        for name in foreign:
            if getattr(self, name) != plain[name]:
                kind = "an emulated" if self.ssh is None else "an ssh"
                raise ValueError(f"{name} means nothing to {kind} board; remove it")
        for name in _EMULATION:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.jitter_ms < 1e5:
            raise ValueError(f"jitter_ms must be at least 0, got {self.jitter_ms}")


_EMULATION = ("memory_bytes", "cpu_quota", "watts")
_OVER_SSH = (
    "port",
    "identity",
    "ssh_options",
    "workdir",
    "python",
    "extras",
    "packages",
    "power_commands",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModeConfig:
    """What a power mode makes of emulated boards; real ones have `power_commands`."""

    speed: float = 1.0
    """Share of a board's speed."""
    power: float = 1.0
    """Share of its power while it computes."""

    def __post_init__(self) -> None:
        for name in ("speed", "power"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """A fault that happens to a board."""

    board: str
    """Its name in `boards`."""
    do: Literal["kill", "power-cut", "throttle", "link", "cut"]
    """`kill`: its program dies and connections are closed; `power-cut`: it is gone and nobody is
    told; `throttle`: it has `factor` of its speed; `link`: its link becomes `to`; `cut`: nothing
    passes its link."""
    at_s: float | None = None
    """When it begins, in seconds after the boards were started."""
    at_step: int | None = None
    """When it begins, in steps of the run: the board has finished so many, or a later one."""
    seconds: float | None = None
    """Seconds until all is as before: the program is started again, speed and link are back. None:
    never, except that `restarts` holds for `kill`, too."""
    factor: float | None = None
    """Share of the speed that `throttle` leaves: above 0, at most 1."""
    to: str | None = None
    """Link that `link` changes to: a name as in `boards.NAME.link`."""

    def __post_init__(self) -> None:
        if (self.at_s is None) == (self.at_step is None):
            raise ValueError("give at_s or at_step, one of them")
        for name in ("at_s", "at_step", "seconds", "factor"):
            value = getattr(self, name)
            if value is not None and not (value > 0 or (value == 0 and name == "at_s")):
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.factor is not None and self.factor > 1:
            raise ValueError(f"factor must be at most 1, got {self.factor}")
        needed = {"throttle": "factor", "link": "to", "cut": "seconds"}.get(self.do)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{needed} is missing, which {self.do} needs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSection:
    """How boards are treated, and which methods run on them."""

    presets: tuple[str, ...] = ()
    """Names of presets, or of `methods`, which are run in this order; empty: the run as it is."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """Further methods by name."""
    seeds: tuple[int, ...] = ()
    """Seeds; each method is run with each of them. Empty: training.seed."""
    power_modes: dict[str, PowerModeConfig] = field(default_factory=dict)
    """Power modes by name; each method is run in each of them. Empty: boards stay as they are."""
    target: float | None = None
    """Loss that times are measured to; None: the lowest that every run reached."""
    data: DataConfig = field(default_factory=DataConfig)
    """How every board's data is read; `path` is for boards without `data`."""
    address: str | None = None
    """Host name of this machine for ssh boards; None: that of the way to each of them."""
    restarts: int = 0
    """How often a board's program is started again after it has died: after 1 s, then twice as
    long each time, up to 60 s."""
    cores: float = 1.0
    """Cores of this machine for the strongest emulated board; the others have less, in proportion
    to their peaks."""
    must_limit: bool = True
    """Whether emulated boards need their limits. False: without the rights for control groups the
    experiment goes on with whole cores and all memory, and says so."""
    network: Literal["relay", "namespaces"] = "relay"
    """How links of emulated boards are made. `relay`: by a relay of ours, which needs no rights;
    `namespaces`: by a network namespace for each board and the kernel's own limits, as root; links
    with a delay need a kernel with netem."""
    coordinator_threads: int = 1
    """CPU threads of the coordinator."""
    wheel: Path | None = None
    """Wheel that is installed on ssh boards; None: one is built from this checkout."""
    limit_s: float | None = None
    """A run that has not ended after so many seconds is stopped."""
    boards: dict[str, Board] = field(default_factory=dict)
    """Further boards to emulate, by name."""
    links: dict[str, Connection] = field(default_factory=dict)
    """Further links, by name."""

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in NAMES and name not in self.methods:
                known = ", ".join((*NAMES, *self.methods))
                raise ValueError(f"presets: {name!r} is unknown; there are {known}")
        for name in ("presets", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must hold different entries")
        for name in self.power_modes:
            if not is_device_name(name):
                raise ValueError(f"power_modes: {name!r} is no name: letters, digits, . _ - only")
        if self.restarts < 0:
            raise ValueError(f"restarts must be at least 0, got {self.restarts}")
        if self.coordinator_threads < 1:
            raise ValueError(
                f"coordinator_threads must be at least 1, got {self.coordinator_threads}"
            )
        for name in ("cores", "limit_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig(ServeConfig):
    """Everything about one experiment: what `serve` reads, boards, and faults.

    Keys and the allow-list are the experiment's own. The run begins when all boards are there;
    afterwards `min_devices` is how many it needs to go on.
    """

    boards: dict[str, BoardConfig] = field(default_factory=dict)
    """Boards by the name under which `devices` has their settings."""
    faults: tuple[FaultConfig, ...] = ()
    """Faults that happen to them."""
    experiment: ExperimentSection = field(default_factory=ExperimentSection)
    """How boards are treated."""

    def __post_init__(self) -> None:
        ServeConfig.__post_init__(self)
        if not self.boards:
            raise ValueError("boards must name at least 1 board")
        if self.min_devices > len(self.boards):
            raise ValueError(f"min_devices is {self.min_devices}, boards are {len(self.boards)}")
        for name, board in self.boards.items():
            if not is_device_name(name):
                raise ValueError(f"boards: {name!r} is no name: letters, digits, . _ - only")
            self._check_names(name, board)
        self._check_places()
        self._check_door()
        for fault in self.faults:
            self._check_fault(fault)

    def _check_names(self, name: str, board: BoardConfig) -> None:
        kinds = self.known.boards
        if board.emulated and board.emulated not in kinds:
            raise ValueError(
                f"boards: {name}.emulated {board.emulated!r} is unknown; there are "
                f"{', '.join(kinds)}"
            )
        self._check_link(f"boards: {name}.link", board.link)
        modes = self.experiment.power_modes
        missing = [mode for mode in modes if mode not in board.power_commands]
        if board.ssh is not None and missing:
            raise ValueError(f"boards: {name}.power_commands lacks {', '.join(missing)}")
        if unknown := sorted(board.power_commands.keys() - modes.keys()):
            raise ValueError(
                f"boards: {name}.power_commands has {', '.join(unknown)}, which is not in "
                "experiment.power_modes"
            )

    def _check_places(self) -> None:
        """Refuse two boards in one folder, which would make one environment at the same time."""
        seen: dict[tuple[str, int | None, str], str] = {}
        for name, board in self.boards.items():
            if board.ssh is not None:
                place = (board.ssh, board.port, os.path.normpath(board.workdir))
                if (other := seen.setdefault(place, name)) != name:
                    raise ValueError(
                        f"boards: {other} and {name} are both in {board.workdir!r} of "
                        f"{board.ssh}; give one of them another workdir"
                    )

    def _check_door(self) -> None:
        """Refuse an address that boards in namespaces cannot reach."""
        host = self.listen.removeprefix("tcp://").rpartition(":")[0]
        is_mixed = any(board.ssh is not None for board in self.boards.values())
        if self.experiment.network == "namespaces" and is_mixed and host not in EVERYWHERE:
            raise ValueError(
                f"listen {self.listen!r}: boards in namespaces cannot reach it; use tcp://*:PORT"
            )

    def _check_link(self, key: str, link: str | None) -> None:
        links = self.known.links
        if link is not None and link not in links:
            raise ValueError(f"{key} {link!r} is unknown; there are {', '.join(links)}")

    def _check_fault(self, fault: FaultConfig) -> None:
        board = self.boards.get(fault.board)
        if board is None:
            raise ValueError(
                f"faults: there is no board {fault.board!r}; there are {', '.join(self.boards)}"
            )
        if fault.do == "throttle" and board.ssh is not None:
            raise ValueError(f"faults: {fault.board} is an ssh board, whose speed is its own")
        if fault.do == "throttle" and not self.experiment.must_limit:
            raise ValueError(
                f"faults: {fault.board} cannot be throttled without limits; remove "
                "experiment.must_limit=false, or the fault"
            )
        self._check_link(f"faults: {fault.board}.to", fault.to)

    @property
    def known(self) -> Catalogue:
        """Boards to emulate and links, by name."""
        return known(self.experiment.boards, self.experiment.links)

    def serve_config(self) -> ServeConfig:
        """Return the configuration of the coordinator itself."""
        values = {each.name: getattr(self, each.name) for each in fields(ServeConfig)}
        return ServeConfig(**values | {"min_devices": len(self.boards)})


# ---- boards on this machine ----


def data_sheet(config: ExperimentConfig, name: str) -> Board | None:
    """Return the data sheet of an emulated board; None for a real one."""
    kind = config.boards[name].emulated
    return config.known.boards[kind] if kind else None


def watts(config: ExperimentConfig, name: str) -> float:
    """Return the power of an emulated board while it computes, in watts."""
    sheet = data_sheet(config, name)
    assert sheet is not None, "real boards have a meter, or none"
    return config.boards[name].watts or sheet.watts


def memory_bytes(config: ExperimentConfig, name: str) -> float:
    """Return the memory of an emulated board, in bytes."""
    sheet = data_sheet(config, name)
    assert sheet is not None, "real boards have their own"
    return config.boards[name].memory_bytes or free_bytes(sheet, Scale())


def cores(config: ExperimentConfig) -> dict[str, float]:
    """Return the cores of every emulated board."""
    sheets = {name: data_sheet(config, name) for name in config.boards}
    peaks = {name: sheet.tflops for name, sheet in sheets.items() if sheet is not None}
    strongest = max(peaks.values(), default=1.0)
    return {
        name: config.boards[name].cpu_quota or config.experiment.cores * peak / strongest
        for name, peak in peaks.items()
    }


def link_shape(config: ExperimentConfig, link: str | None, jitter_ms: float) -> LinkShape:
    """Return how the relay of a board behind *link* behaves."""
    jitter_s = jitter_ms / 1e3
    if link is None:
        return LinkShape(jitter_s=jitter_s)
    connection = config.known.links[link]
    return LinkShape(
        up_bytes_per_s=connection.up_mbit * BYTES_PER_MBIT,
        down_bytes_per_s=connection.down_mbit * BYTES_PER_MBIT,
        delay_s=connection.rtt_ms / 2e3,
        jitter_s=jitter_s,
    )


def needs_relay(config: ExperimentConfig, name: str) -> bool:
    """Return whether a board dials a relay: emulated ones do, and real ones with another link."""
    board = config.boards[name]
    changed = any(f.board == name and f.do in ("power-cut", "link", "cut") for f in config.faults)
    return board.emulated is not None or board.link is not None or changed or board.jitter_ms > 0


def load_experiment(
    file: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ
) -> tuple[ExperimentConfig, dict[str, ExperimentConfig]]:
    """Return the experiment that a file describes, and the config of each of its methods.

    Raises:
        ConfigError: as `load_config`; or the file contradicts one of the presets.
    """
    from coordinator.config.presets import load_with_preset

    config = load_with_preset(ExperimentConfig, file, overrides, env)
    if config.trained_by == "coordinator":
        raise ConfigError("trained_by: an experiment trains on boards; use `coordinator serve`")
    names = config.experiment.presets
    if not names:
        return config, {config.preset or "run": config}
    if config.preset is not None:
        raise ConfigError("preset: name it in experiment.presets instead; remove it")
    methods = {}
    for name in names:
        own = config.experiment.methods.get(name)
        preset, settings = (own.preset, own.settings) if own else (name, ())
        own_settings = [*overrides, *settings]
        methods[name] = load_with_preset(ExperimentConfig, file, own_settings, env, preset=preset)
        if methods[name].trained_by == "coordinator":
            raise ConfigError(f"experiment.presets: {name} trains without boards; remove it")
        for key in OF_ALL_METHODS:
            if getattr(methods[name], key) != getattr(config, key):
                raise ConfigError(
                    f"experiment.methods: {name} changes {key}, which all methods share; change it "
                    "for all of them, or write another experiment"
                )
    return config, methods
