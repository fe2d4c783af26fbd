"""The configuration of a simulated run: that of a coordinator, and its devices."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.gateway.keys.allow_list import is_device_name
from coordinator.lab.simulation.boards import Board, Connection, Scale
from edge_sdk.data.rows import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDeviceConfig:
    """One device, or several of a kind."""

    board: str = "orin-nano-8gb"
    """Name in coordinator/lab/simulation/boards.yaml or in `boards`."""
    link: str = "wifi-good"
    """Name in coordinator/lab/simulation/links.yaml or in `links`."""
    count: int = 1
    """So many devices of this kind, named NAME-0, NAME-1, ...; one keeps the plain name."""
    memory_bytes: float | None = None
    """Memory for the run, instead of the board's."""
    flops_per_s: float | None = None
    """Speed in training, instead of the board's peak times `utilisation`."""
    data: str | None = None
    """A training file of its own, instead of a share of `simulation.data`."""
    slowdown: float = 1.0
    """So many times slower than its profile says it computes and sends: a straggler that no plan
    knows of."""
    leaves_after_step: int | None = None
    """Steps of the run after which it is gone for good; None: it stays."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.count > 1 and self.data is not None:
            raise ValueError("data is the file of one device: count must be 1")
        for name in ("memory_bytes", "flops_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 1 <= self.slowdown < float("inf"):
            raise ValueError(f"slowdown must be at least 1, got {self.slowdown}")
        if self.leaves_after_step is not None and self.leaves_after_step < 1:
            raise ValueError(f"leaves_after_step must be at least 1, got {self.leaves_after_step}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Which devices take part, on which data, and how fast everything is meant to be."""

    devices: dict[str, SimulatedDeviceConfig] = field(default_factory=dict)
    """The devices by name; what each trains is set in `devices` of the run, as always."""
    num_devices: int | None = None
    """So many devices in all, of the kinds in `devices` in the proportions of their `count`, whose
    numbers then do not count; None: as many as are counted."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training data that is dealt out; its columns count for files of single devices too."""
    shards: Literal["contiguous", "iid", "dirichlet"] = "iid"
    """How: in the order of the file, at random, or each class in proportions of its own."""
    alpha: float = 0.5
    """Concentration of `dirichlet`: small is skewed. Classes are those of the labels; texts
    without labels are sorted into ten classes by length."""
    coordinator: str = "a100-80gb"
    """Board of the coordinator; `planning.server_memory_bytes` and `planning.server_flops_per_s`
    win where they are set."""
    utilisation: float = 0.3
    """Share of a board's peak that training reaches."""
    jitter: float = 0.0
    """Largest share by which the speed of a device differs from one computation to the next, drawn
    anew for each stretch of a micro-batch."""
    overhead_bytes: float = 0.6e9
    """What a device's process takes before any part of the model."""
    boards: dict[str, Board] = field(default_factory=dict)
    """Further boards, by name."""
    links: dict[str, Connection] = field(default_factory=dict)
    """Further links, by name."""
    scale: Scale = field(default_factory=Scale)
    """For a small model that stands for a large one; see docs/simulation.md."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's own choice."""
    cache: Path | None = None
    """Downloaded parts of models; None: edgesplit/parts in the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be above 0 and at most 1, got {self.utilisation}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {self.jitter}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a number above 0, got {self.alpha}")
        if self.overhead_bytes < 0:
            raise ValueError(f"overhead_bytes must be at least 0, got {self.overhead_bytes}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.num_devices is not None:
            if self.num_devices < 1:
                raise ValueError(f"num_devices must be at least 1, got {self.num_devices}")
            if any(device.data is not None for device in self.devices.values()):
                raise ValueError("num_devices: a device has `data` of its own; give it to none")
        for name in device_names(self):
            if not is_device_name(name):
                raise ValueError(f"devices: {name!r} is no name: letters, digits, . _ - only")
        if self.devices and all(d.leaves_after_step is not None for d in self.devices.values()):
            raise ValueError("devices: at least 1 must stay, all have leaves_after_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig(ServeConfig):
    """Everything about one simulated run: what `serve` reads, and who takes part.

    Keys, listening address and patience mean nothing here; every round waits for every device.
    """

    simulation: FleetConfig = field(default_factory=FleetConfig)
    """The devices that are simulated."""

    def __post_init__(self) -> None:
        ServeConfig.__post_init__(self)
        if not self.simulation.devices:
            raise ValueError("simulation.devices must name at least 1 device")
        object.__setattr__(self, "devices", _named_singly(self.devices, self.simulation))

    def serve_config(self) -> ServeConfig:
        """Return the configuration of the coordinator itself."""
        values = {each.name: getattr(self, each.name) for each in fields(ServeConfig)}
        return ServeConfig(**values | {"min_devices": len(device_names(self.simulation))})


def device_names(fleet: FleetConfig) -> dict[str, SimulatedDeviceConfig]:
    """Return every single device by its name, in order.

    Raises:
        ValueError: two devices have one name.
    """
    devices: dict[str, SimulatedDeviceConfig] = {}
    counts = _counts(fleet)
    for name, device in fleet.devices.items():
        count = counts[name]
        names = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
        for each in names:
            if each in devices:
                raise ValueError(f"devices: two are named {each!r}")
            devices[each] = device
    return dict(sorted(devices.items()))


def _named_singly(
    settings: dict[str, DeviceSettings], fleet: FleetConfig
) -> dict[str, DeviceSettings]:
    """Return settings in which those of a kind stand at each of its devices; single ones win."""
    counts = {name: count for name, count in _counts(fleet).items() if count != 1}
    of_kinds = {
        f"{kind}-{i}": settings[kind]
        for kind, count in counts.items()
        if kind in settings
        for i in range(count)
    }
    return of_kinds | {name: own for name, own in settings.items() if name not in counts}


def _counts(fleet: FleetConfig) -> dict[str, int]:
    """Return how many devices there are of each kind; parts of a device go to the largest parts."""
    counts = {name: device.count for name, device in fleet.devices.items()}
    if fleet.num_devices is None or not counts:
        return counts
    all_of_them = sum(counts.values())
    whole = {name: fleet.num_devices * n // all_of_them for name, n in counts.items()}
    left = fleet.num_devices - sum(whole.values())
    parts = {name: fleet.num_devices * n % all_of_them for name, n in counts.items()}
    for name in sorted(parts, key=parts.__getitem__, reverse=True)[:left]:
        whole[name] += 1
    return whole
