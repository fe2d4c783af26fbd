"""Costs and losses of `against_peft.py`, as rows of tables."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass
class Found:
    """What an arrangement has cost, from the first round's start to the last one's end."""

    cpu_s: float
    """CPU time of all processes."""
    device_cpu_s: float
    """That of the devices; of plain PEFT all of it."""
    wall_s: float
    peak_bytes: int
    """Most resident memory of the largest device, or of plain PEFT."""
    link_bytes: float
    """Bytes a sample, of all devices, up and down."""
    start_cpu_s: float
    """CPU time of all processes before and after."""
    start_wall_s: float
    """Seconds from the first process's start to the first round, and from the last to the end."""


Runs = dict[tuple[int, bool], list[Found]]
"""What each arrangement has cost, by its number of devices and whether they split the model."""

COSTS = (
    "what",
    "CPU ms a sample",
    "x plain",
    "of them devices",
    "wall ms a sample",
    "x plain",
    "start and end: CPU s",
    "wall s",
)
REST = ("what", "peak MiB", "above imports", "x plain", "kB a sample")


def name_of(key: tuple[int, bool]) -> str:
    """Return what a row is called."""
    devices, is_split = key
    fleet = "one device" if devices == 1 else f"{devices} devices"
    return fleet if is_split else f"plain PEFT, batches of {fleet}"


def cost_row(key: tuple[int, bool], found: Runs, samples: int) -> list[str]:
    """Return the cells of the first table."""
    own, base = found[key], found[key[0], False]

    def ratio(name: str) -> str:
        pairs = zip(own, base, strict=True)
        return f"{median(getattr(a, name) / getattr(b, name) for a, b in pairs):.2f}"

    def each(name: str) -> str:
        values = [1000 * getattr(run, name) / samples for run in own]
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    return [
        name_of(key),
        each("cpu_s"),
        ratio("cpu_s"),
        f"{1000 * median(run.device_cpu_s for run in own) / samples:.2f}" if key[1] else "",
        each("wall_s"),
        ratio("wall_s"),
        f"{median(run.start_cpu_s for run in own):.1f}",
        f"{median(run.start_wall_s for run in own):.1f}",
    ]


def rest_row(key: tuple[int, bool], found: Runs, floor: int) -> list[str]:
    """Return the cells of the second table."""
    peak, base = (median(run.peak_bytes for run in found[k]) for k in (key, (key[0], False)))
    return [
        name_of(key),
        f"{peak / 2**20:.0f}",
        f"{(peak - floor) / 2**20:.0f}",
        f"{(peak - floor) / (base - floor):.2f}",
        f"{median(run.link_bytes for run in found[key]) / 1000:.1f}" if key[1] else "",
    ]


def loss_row(key: tuple[int, bool], losses: dict[tuple[int, bool, float], float]) -> list[str]:
    """Return the cells of the third table."""
    own, base = (
        {rate: loss for (*which, rate), loss in losses.items() if tuple(which) == wanted}
        for wanted in (key, (key[0], False))
    )
    cells = [f"{loss:.4f} ({loss / base[rate] - 1:+.1%})" for rate, loss in own.items()]
    best = min(own.values())
    return [name_of(key), *cells, f"{best:.4f}", f"{best / min(base.values()) - 1:+.2%}"]
