"""What trackers are told: which numbers there are, and what each tracker is.

A number belongs to the run or to one device, and to a step that is done. Names are those of HF's
Trainer where it has any. Knows no event and no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from coordinator.config.run import ServeConfig
from coordinator.config.scoring import SCORES


class Meaning(NamedTuple):
    """What a number says."""

    text: str
    is_total: bool = False
    """Whether it only grows, as long as the same program counts."""


RUN_NUMBERS = {
    "train/loss": Meaning("Mean training loss per target over the steps of a round, all devices"),
    "train/learning_rate": Meaning("Learning rate of the last step"),
    "train/global_step": Meaning("Optimizer steps done"),
    "train/round": Meaning("Rounds done"),
    "train/num_input_tokens_seen": Meaning("Tokens trained on, padding excluded", is_total=True),
    "train/samples": Meaning("Samples trained on", is_total=True),
    "train/update_rank": Meaning("Largest rank of the joined update of a weight"),
    "train/lag": Meaning("Largest share of what is learned that a device begins a round without"),
    "eval/loss": Meaning("Loss on the coordinator's file, else over the devices' validation data"),
    "eval/accuracy": Meaning("Share of right predictions there"),
    "eval/perplexity": Meaning("exp(loss) there, of language models"),
    "test/loss": Meaning("Loss of the result on the test file, once at the end"),
    "test/accuracy": Meaning("Share of right predictions there"),
    "test/perplexity": Meaning("exp(loss) there, of language models"),
    **{
        f"{what}/{name}": Meaning(f"{kind.meaning}, {where}")
        for what, where in (("eval", "on the coordinator's file"), ("test", "on the test file"))
        for name, kind in SCORES.items()
    },
    "round/seconds": Meaning("Seconds that the last round took"),
    "round/devices": Meaning("Devices in the round"),
    "run/waiting": Meaning("Devices that keep the run waiting"),
    "traffic/up_bytes": Meaning("Bytes from all devices", is_total=True),
    "traffic/down_bytes": Meaning("Bytes to all devices", is_total=True),
}
DEVICE_NUMBERS = {
    "train/loss": Meaning("Training loss of the device's last step"),
    "train/global_step": Meaning("Optimizer steps that the device has done"),
    "train/tokens_per_second": Meaning("Tokens a second of its last step, waiting included"),
    "train/compute_seconds": Meaning("Seconds of computing in its last step"),
    "train/wait_seconds": Meaning("Seconds of waiting in its last step"),
    "eval/loss": Meaning("Loss on its private validation data"),
    "eval/accuracy": Meaning("Share of right predictions there"),
    "eval/perplexity": Meaning("exp(loss) there, of language models"),
    "plan/blocks": Meaning("Blocks of the model on the device"),
    "plan/mean_rank": Meaning("Mean rank of its adapters"),
    "traffic/up_bytes": Meaning("Bytes from the device", is_total=True),
    "traffic/down_bytes": Meaning("Bytes to the device", is_total=True),
    "memory/program_peak_bytes": Meaning("Most memory that its program has taken"),
    "board/memory_used_bytes": Meaning("Memory of the whole board that is taken"),
    "board/temperature_celsius": Meaning("Temperature of the board"),
    "board/power_watts": Meaning("Power that the board draws"),
    "board/energy_joules": Meaning("Energy since its program began", is_total=True),
    "run/troubles": Meaning("Losses, delays, rejected messages and refused uploads", is_total=True),
}


class Number(NamedTuple):
    """One number."""

    name: str
    value: float
    device: str | None = None
    """Whose it is; None: the run's."""


class Moment(NamedTuple):
    """Numbers of one moment."""

    source: str
    """Whose steps count: of the rounds, or of one device."""
    step: int
    """Optimizer steps done."""
    time_s: float
    """Unix time."""
    numbers: tuple[Number, ...]
    is_live: bool = False
    """Whether only the newest is of interest: nobody needs it as a point of a curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """The run that is told of."""

    name: str
    folder: Path
    """Where trackers may write, each below a name of its own."""
    facts: dict[str, Any]
    """How it is trained, flat; no path, no address."""
    config: ServeConfig
    ident: str | None = None
    """What the tracker has called this run before, where it goes on."""


class Tracker(Protocol):
    """Something that keeps or shows numbers, in a thread of its own; it may raise anything."""

    takes_live: bool
    """Whether it also wants what is no point of a curve."""

    def open(self, about: TrackedRun) -> str | None:
        """Begin, or go on with, a run; return what it is called there."""

    def take(self, samples: Sequence[Moment]) -> None:
        """Keep *samples*, in their order."""

    def close(self, *, completed: bool) -> None:
        """End: nothing more comes."""

    def abandon(self) -> None:
        """Let go of whatever would keep this program from ending; from another thread."""
