"""The `paper` section of a comparison: whose experiment it is, what it needs, what was published.

Knows neither how a measure is counted (`ours.py`) nor how a scale is applied (`recipe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from coordinator.config.scoring import SCORES


class MeasureName(NamedTuple):
    """What a paper's value is of."""

    title: str
    """For a reader, with the unit."""
    digits: int
    """Digits behind the point of our own value."""
    unit: float = 1.0
    """What one of the unit is in files for programs."""

    @property
    def has_reference(self) -> bool:
        """Whether it is held against another row of the comparison."""
        return "reference" in self.title


MEASURES: dict[str, MeasureName] = {
    "loss": MeasureName("loss", 4),
    "perplexity": MeasureName("perplexity", 3),
    "accuracy": MeasureName("accuracy (%)", 2),
    **{name: MeasureName(s.title, s.digits, 1 / s.factor) for name, s in SCORES.items()},
    "perplexity_rise": MeasureName("perplexity over homogeneous", 3),
    "perplexity_behind": MeasureName("perplexity over reference", 3),
    "slowdown": MeasureName("samples to target, x reference", 2),
    "time_ratio": MeasureName("time to target, x reference", 2),
    "traffic_share": MeasureName("traffic (% of reference)", 1),
    "uplink_share": MeasureName("traffic up (% of reference)", 1),
    "traffic": MeasureName("traffic (MB)", 1, 1e6),
    "modelled_s": MeasureName("time of the run (s)", 1),
    "trained": MeasureName("most trained on a device", 0),
}
"""By the word in `values`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """What a paper says of one method."""

    method: str
    """A row of the comparison, or a method that is not run here."""
    devices: Literal["homogeneous", "heterogeneous", "one-cut"]
    """The set of devices that the paper's are."""
    values: dict[str, float]
    """The paper's value by measure, in the unit of our tables."""
    source: str
    """Table, figure or page; and how sure it is, where the paper itself was not read."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.values.keys() - MEASURES.keys()):
            known = ", ".join(MEASURES)
            raise ValueError(f"values: {unknown[0]!r} is no measure; there are {known}")
        if not self.values:
            raise ValueError(f"values of {self.method!r} must name at least 1 measure")


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededData:
    """Data that a person has to fetch: none of it is part of this project."""

    title: str
    """What the data is called."""
    license: str
    """Its license, for whoever fetches it."""
    origin: str
    """Where it is fetched from, and what has to be done with it."""
    files: dict[str, str]
    """Setting -> file in the folder that `data=FOLDER` names; `.` is the folder itself, or a
    Hugging Face id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSection:
    """A published experiment."""

    title: str
    """Title of the paper."""
    source: str
    """Where it is found, its arXiv number mostly."""
    data: NeededData | None = None
    """What it is trained on."""
    scales: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """`key=value` over the file by the word after `--scale`."""
    numbers: tuple[PublishedRow, ...] = ()
    """What was published."""
    scale: str | None = None
    """The one of `scales` that holds; `--scale` sets it. The published numbers are not to be
    compared with what another model learns from other data, and the report says so."""
