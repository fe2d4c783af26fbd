"""What an application may listen to; override what you need."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdk.protocol.messages import StepReport
    from edge_sdk.protocol.plan import Plan


log = logging.getLogger(__name__)

# The reason given to `on_train_end` when an error ends the client; `run` and `wait` raise it.
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """The steps of a round, before the first of them."""

    round: int
    """Counted from 0, as in messages; people count from 1."""
    step: int
    """First step of the round."""
    end_step: int
    """First step of the next round."""
    total_steps: int
    """Steps of the run."""


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One round as the device saw it."""

    round: int
    """Counted from 0, as in messages; people count from 1."""
    step: int
    """First step of the next round."""
    train_loss: float
    """Mean loss per target over the round's steps."""
    bytes_up: int
    """Bytes sent since the start of the program."""
    bytes_down: int
    """Bytes received since then."""


class Callback:
    """Called from the client's thread, one call at a time; keep it short."""

    def on_connect(self, run: str) -> None:
        """Hear that the coordinator has welcomed this device to *run*."""

    def on_plan(self, plan: Plan) -> None:
        """Hear what this device is to run."""

    def on_status(self, doing: str) -> None:
        """Hear in a few words what takes a while from now on, for a person who waits."""

    def on_absent(self, reason: str) -> None:
        """Hear that nobody answers yet; unless this is overridden, a warning in the log."""
        log.warning("coordinator.absent reason=%s", reason)

    def on_round_start(self, begun: RoundBegun) -> None:
        """Hear that the steps of a round begin."""

    def on_step_end(self, report: StepReport) -> None:
        """Hear that an optimizer step is done."""

    def on_round_end(self, summary: RoundSummary) -> None:
        """Hear that the device has handed in its adapters of a round."""

    def on_disconnect(self, reason: str) -> None:
        """Hear that the session is lost; the client tries again by itself."""

    def on_train_end(self, reason: str) -> None:
        """Hear that the run is over, was stopped, or has failed for this device."""
